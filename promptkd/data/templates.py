"""Chat templates: the prompts that a tokenizer's own template makes of rows, its arguments and its clock.

Arguments and time belong to a tokenizer object while a program runs. They are not saved with it.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from promptkd.config.template_options import TemplateSettings
from promptkd.data.messages import ASSISTANT, Message
from promptkd.data.rows import Row, render_prompt
from promptkd.data.special_tokens import Tokenizer
from promptkd.data.thoughts import SWITCHES, has_marker, template_text, thought_markers
from promptkd.errors import UserError

Template = Callable[[Row, str], str]  # row, its file and place (for errors) -> prompt
TIME = "%Y-%m-%dT%H:%M:%S"
QUESTION, ANSWER = "WHATISASKED", "WHATISSAID"  # stand for texts, to learn what a template puts around them
_EXCHANGE = [{"role": "user", "content": QUESTION}, {"role": ASSISTANT, "content": ANSWER}]


def template_of(name: str, tokenizer: Tokenizer) -> Template:
    """Return the template called "published" or "chat". Raise UserError where the tokenizer has no chat template."""
    return ChatTemplate(tokenizer) if name == "chat" else render_prompt


def find_chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the tokenizer's chat template, None where it has none that can be used."""
    try:
        return ChatTemplate(tokenizer)
    except UserError:
        return None


@dataclass(frozen=True)
class ChatArguments:
    """What a chat template gets besides the conversation.

    Attributes:
        values: The arguments of --chat-template-kwargs.
        time: The time that `strftime_now` in the template reads, None for the clock.
    """

    values: dict[str, Any] = field(default_factory=dict)
    time: str | None = None


def bind_settings(tokenizer: Tokenizer, settings: TemplateSettings, start: str) -> None:
    """Bind the options about the chat template to a tokenizer, and set `template_time` where the template reads it.

    Args:
        tokenizer: The tokenizer.
        settings: The options.
        start: The time where the options name none.

    Raises:
        UserError: The template does not read an option, or the program sets that argument itself.
    """
    name, values = tokenizer.name_or_path, settings.chat_template_kwargs or {}
    if settings.template == "chat":
        if "strftime_now" in template_text(tokenizer):
            settings.template_time = settings.template_time or start
        elif settings.template_time is not None:
            raise UserError(f"--template-time: the chat template of {name} does not write the time: leave it out")
    reserved = inspect.signature(tokenizer.apply_chat_template).parameters if values else {}
    for key in values:
        if key in reserved and key != "documents":
            raise UserError(f"--chat-template-kwargs: {key!r} is set by this program: leave it out")
        if not re.search(rf"\b{re.escape(key)}\b", template_text(tokenizer)):
            raise UserError(
                f"--chat-template-kwargs: the chat template of {name} does not read {key!r}: "
                "correct the name, or leave it out"
            )
    tokenizer.chat_arguments = ChatArguments(dict(values), settings.template_time)


def now() -> str:
    """Return the present time, as --template-time takes it."""
    return datetime.datetime.now().strftime(TIME)


class ChatTemplate:
    """A row's conversation in the tokenizer's chat template, up to the beginning of the assistant's turn.

    The user says the instruction with its input below it. A "prompt" beside turns is ignored, since another template
    made it (the published test sets have one). Without turns, the user says the "prompt". A prompt that this template
    made earlier stays unchanged.

    Templates of models that think write an empty thought before a plain answer, or open a thought where an answer has
    to begin. Training responses and references are plain answers. So a prompt is what the template itself writes before
    such an answer, unless --chat-template-kwargs asks for thoughts: then it is the template's generation prompt.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"--template chat: the tokenizer of {tokenizer.name_or_path} has no chat template: "
                "take an instruct model's, or leave --template out"
            )
        self.answers_plainly = False
        head, question, self.tail = self._render([{"role": "user", "content": QUESTION}]).partition(QUESTION)
        if not question:
            raise UserError(
                f"--template chat: the chat template of {tokenizer.name_or_path} leaves out what the user says: "
                "take another model's, or leave --template out"
            )
        messages = [{"role": "system", "content": QUESTION}, {"role": "user", "content": ANSWER}]
        system = _around(tokenizer, messages, QUESTION, add_generation_prompt=True)
        self.heads = {text.partition("\n")[0] for text in (head, system[0] if system else head)}
        self.tails = [self.tail]
        plain = _plain_tail(tokenizer)
        if plain not in (None, self.tail) and has_marker(f"{self.tail}{plain}", thought_markers(tokenizer)):
            assert plain is not None
            self.tails.append(plain)
            values = _arguments_of(tokenizer).values
            self.answers_plainly = not any(values.get(switch) for switch in SWITCHES)
            self.tail = plain if self.answers_plainly else self.tail

    def __call__(self, row: Row, where: str = "row") -> str:
        """Return the prompt of a row. Raise UserError where the template cannot say what the row holds."""
        if row.prompt is not None and self.rendered(row.prompt):
            return row.prompt
        prompt = self._render(row.messages, row.tools, where)
        for message in row.messages:
            if message["role"] in ("system", "user") and message["content"].strip() not in prompt:
                raise UserError(
                    f"{where}: the chat template of {self.tokenizer.name_or_path} leaves out or changes what the "
                    f"{message['role']} says: take it out of the row, or leave --template out"
                )
        return prompt

    def rendered(self, prompt: str) -> bool:
        """Return whether this template made a prompt, judged by its first line and its end.

        The system prompt and the date (Llama 3.2 writes it) may differ. A template that puts nothing around a
        conversation made no prompt.
        """
        around = ((head, tail) for head in self.heads for tail in self.tails if head or tail)
        return any(prompt.startswith(head) and prompt.endswith(tail) for head, tail in around)

    def _render(self, messages: list[Message], tools: list[Any] | None = None, where: str = "") -> str:
        options = {"tools": tools} if tools else {}
        try:
            if not self.answers_plainly:
                return _apply(self.tokenizer, messages, add_generation_prompt=True, **options)
            text = _apply(self.tokenizer, [*messages, {"role": ASSISTANT, "content": ANSWER}], **options)
            return text.rpartition(ANSWER)[0]
        except Exception as error:  # the template is a program that others wrote; jinja's sandbox runs it
            place = f"{where}: " if where else ""
            raise UserError(
                f"{place}--template chat: the chat template of {self.tokenizer.name_or_path} cannot be used ({error}): "
                "take another model's, or leave --template out"
            ) from None


def end_of_turn_id(tokenizer: Tokenizer) -> int:
    """Return the token that ends an assistant's turn: end-of-text, or the chat template's (Gemma, Phi 3)."""
    eos: int = tokenizer.eos_token_id
    around = _around(tokenizer, _EXCHANGE, ANSWER) if getattr(tokenizer, "chat_template", None) else None
    if around is None:
        return eos
    ids: list[int] = tokenizer(around[1], add_special_tokens=False)["input_ids"]
    special = special_token_ids(tokenizer)
    return next((token for token in ids if token in special), eos)


def special_token_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the tokens that stand for no text."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def _plain_tail(tokenizer: Tokenizer) -> str | None:
    """Return what the template writes between a user's text and a plain answer; None where that is unknown."""
    before, _ = _around(tokenizer, _EXCHANGE, ANSWER) or ("", "")
    _, question, tail = before.partition(QUESTION)
    return tail if question else None


def _around(tokenizer: Tokenizer, messages: list[Message], text: str, **options: Any) -> tuple[str, str] | None:
    """Return what a template writes before and behind a text; None where it refuses the messages or omits the text."""
    try:
        before, written, behind = _apply(tokenizer, messages, **options).rpartition(text)
    except Exception:  # Gemma's template refuses system messages, for example
        return None
    return (before, behind) if written else None


def _arguments_of(tokenizer: Tokenizer) -> ChatArguments:
    return getattr(tokenizer, "chat_arguments", None) or ChatArguments()


def _apply(tokenizer: Tokenizer, messages: list[Message], **options: Any) -> str:
    """Call `apply_chat_template` with the bound arguments and time. Raises whatever the template raises."""
    arguments = _arguments_of(tokenizer)
    with _clock_at(arguments.time):
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **arguments.values, **options)
    return text


@contextlib.contextmanager
def _clock_at(time: str | None) -> Iterator[None]:
    """Let `strftime_now` in chat templates read `time`. transformers has no argument for that."""
    if time is None:
        yield
        return
    from transformers.utils import chat_template_utils

    module: Any = chat_template_utils
    moment, real = datetime.datetime.strptime(time, TIME), module.datetime
    module.datetime = SimpleNamespace(now=lambda tz=None: moment)
    try:
        yield
    finally:
        module.datetime = real
