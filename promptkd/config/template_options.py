"""Options about the template that makes prompts of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from promptkd.config.values import moment, option
from promptkd.errors import UserError


@dataclass
class TemplateSettings:
    template: Literal["published", "chat"] = option(
        "published",
        "template of the prompts. published: that of the published code. chat: the tokenizer's chat template",
    )
    chat_template_kwargs: dict[str, Any] | None = option(
        None, "arguments of the chat template as a JSON object, such as '{\"enable_thinking\": false}'", metavar="JSON"
    )
    template_time: str | None = option(
        None,
        "time that a chat template with a date writes, such as 2026-11-25 (default: when the run started, or the "
        "resumed run)",
        type=moment,
    )

    def __post_init__(self) -> None:
        for name in ("chat_template_kwargs", "template_time"):
            if self.template != "chat" and getattr(self, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is for --template chat: add that, or leave it out")
