"""What a chat template is rendered with besides the conversation: arguments that the user gave, and a fixed time.

Both belong to a tokenizer for as long as a program runs. Nothing of them is saved with it.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from promptkd.errors import UserError

TIME = "%Y-%m-%dT%H:%M:%S"


@dataclass(frozen=True)
class ChatArguments:
    """What a chat template gets. `time` is what its `strftime_now` reads, None for the clock."""

    values: dict[str, Any] = field(default_factory=dict)
    time: str | None = None


def bind_arguments(tokenizer, values: dict[str, Any] | None, time: str | None) -> None:
    """Have each use of a tokenizer's chat template in this process get these arguments and this time.

    Raises:
        UserError: The template does not read one of the arguments, or a call to it has that argument already.
    """
    own = inspect.signature(tokenizer.apply_chat_template).parameters if values else {}
    for name in values or {}:
        if name in own and name != "documents":
            raise UserError(f"--chat-template-kwargs: {name!r} is set by this program: leave it out")
        if not re.search(rf"\b{re.escape(name)}\b", template_text(tokenizer)):
            raise UserError(
                f"--chat-template-kwargs: the chat template of {tokenizer.name_or_path} does not read {name!r}: "
                "correct the name, or leave it out"
            )
    tokenizer.chat_arguments = ChatArguments(dict(values or {}), time)


def bind_settings(tokenizer, settings, start: str) -> None:
    """Bind the options about the chat template, and write into them the time that it writes.

    Args:
        tokenizer: The tokenizer.
        settings: promptkd.config.options.TemplateSettings.
        start: The time where the options name none.

    Raises:
        UserError: An option is for what the chat template does not read.
    """
    if settings.template == "chat":
        if reads_time(tokenizer):
            settings.template_time = settings.template_time or start
        elif settings.template_time is not None:
            raise UserError(
                f"--template-time: the chat template of {tokenizer.name_or_path} does not write the time: leave it out"
            )
    bind_arguments(tokenizer, settings.chat_template_kwargs, settings.template_time)


def arguments_of(tokenizer) -> ChatArguments:
    """What `bind_arguments` gave to a tokenizer."""
    return getattr(tokenizer, "chat_arguments", None) or ChatArguments()


def template_text(tokenizer) -> str:
    """The source of a tokenizer's chat templates, "" for none."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else "\n".join(template.values())


def reads_time(tokenizer) -> bool:
    """Whether the chat template writes the date."""
    return "strftime_now" in template_text(tokenizer)


def now() -> str:
    """The present moment, as `--template-time` takes it."""
    return datetime.datetime.now().strftime(TIME)


def render(tokenizer, messages: list[dict[str, Any]], **how: Any) -> str:
    """`tokenizer.apply_chat_template` with the arguments and at the time that belong to it. Raises what it raises."""
    arguments = arguments_of(tokenizer)
    with _clock_at(arguments.time):
        return tokenizer.apply_chat_template(messages, tokenize=False, **arguments.values, **how)


@contextlib.contextmanager
def _clock_at(time: str | None) -> Iterator[None]:
    """Let `strftime_now` in chat templates read `time`. transformers hands no function to a template."""
    if time is None:
        yield
        return
    from transformers.utils import chat_template_utils

    moment, real = datetime.datetime.strptime(time, TIME), chat_template_utils.datetime
    chat_template_utils.datetime = SimpleNamespace(now=lambda tz=None: moment)
    try:
        yield
    finally:
        chat_template_utils.datetime = real
