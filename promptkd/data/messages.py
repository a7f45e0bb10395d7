"""Conversations in rows: lists of messages of every common shape become {"role", "content"} with a text."""

from __future__ import annotations

from typing import Any

from promptkd.errors import UserError
from promptkd.utils.strict_json import parse_json

Message = dict[str, Any]
ASSISTANT = "assistant"
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
# Other parts of a message that chat templates read.
CARRIED = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "reasoning")


def is_messages(value: Any) -> bool:
    """Return whether a field is a list of messages. A list of texts is not."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def is_empty(value: Any) -> bool:
    """Return whether a field says nothing. A zero says something."""
    return value is None or value is False or value in ("", [], {})


def read_messages(value: Any, key: str, where: str) -> list[Message]:
    """Read the messages of a field.

    Args:
        value: A list of {"role", "content"} or {"from", "value"}. A content is a text or a list of text parts.
        key: The field's name, for errors.
        where: The row's file and place, for errors.

    Returns:
        {"role", "content"} with a text each, and the parts in `CARRIED`.

    Raises:
        UserError: The value is not such a list, a role is unknown, or a content is not a text.
    """
    if not is_messages(value):
        raise shape_error(where, key, "a list of messages", value)
    return [_read_message(item, f'message {number} of "{key}"', where) for number, item in enumerate(value, 1)]


def read_history(value: Any, where: str) -> list[Message]:
    """Read the turns before the last question: messages, or [question, answer] pairs. Without a value: no turns."""
    if not value:
        return []
    if is_messages(value):
        return read_messages(value, "history", where)
    if not (isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)):
        raise shape_error(where, "history", "a list of [question, answer] pairs or of messages", value)
    turns = [turn for pair in value for turn in zip(("user", ASSISTANT), pair)]
    return [{"role": role, "content": check_text(text, "history", where)} for role, text in turns]


def read_tools(value: Any, where: str) -> list[Any] | None:
    """Read the tools that a chat template offers: a list of objects, or that list as a JSON text, as TRL has it."""
    if isinstance(value, str) and value:
        try:
            value = parse_json(value)
        except ValueError as error:
            raise UserError(f'{where}: the text of its "tools" is not JSON ({error}): correct it') from None
    if value and not is_messages(value):
        raise shape_error(where, "tools", "a list of objects", value)
    return value or None


def unread_parts(value: Any) -> list[str]:
    """Return the parts of messages that `read_messages` does not read, where any message has a value for them.

    A part that is false counts: Axolotl's `train` leaves a turn out of the loss.
    """
    parts = [part for item in (value if is_messages(value) else []) for part in item.items()]
    known = ("role", "from", "content", "value", "id", *CARRIED)
    return [*dict.fromkeys(key for key, part in parts if key not in known and (part is False or not is_empty(part)))]


def check_text(value: Any, key: str, where: str) -> str:
    """Return a value. Raise UserError unless it is a text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise shape_error(where, key, "a text", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f'{where}: "{key}" holds half a character (a lone surrogate): correct it') from None
    return value


def shape_error(where: str, key: str, wanted: str, value: Any) -> UserError:
    """Return the error for a field that holds a value of the wrong type."""
    return UserError(f'{where}: "{key}" has to be {wanted}, not {type(value).__name__}')


def _read_message(item: Message, name: str, where: str) -> Message:
    role = item.get("role") if item.get("role") is not None else item.get("from")
    if not isinstance(role, str) or role.lower() not in ROLES:
        shown = "no role" if role is None else f"the role {str(role)[:40]!r}"
        raise UserError(f"{where}: {name} has {shown}: give it one of {', '.join(dict.fromkeys(ROLES.values()))}")
    content = item.get("content") if item.get("content") is not None else item.get("value")
    if content is None and item.get("tool_calls"):
        content = ""
    carried = {key: item[key] for key in CARRIED if not is_empty(item.get(key))}
    return {"role": ROLES[role.lower()], "content": _read_content(content, name, where), **carried}


def _read_content(content: Any, name: str, where: str) -> str:
    """Return a message's text. The texts of a list of parts are joined."""
    if not isinstance(content, str | list):
        raise UserError(f"{where}: the content of {name} has to be a text, not {type(content).__name__}")
    texts = []
    for part in [content] if isinstance(content, str) else content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(f"{where}: {name} has content of the type {str(kind)[:40]!r}: only text can be read")
        texts.append(check_text(text, name.replace('"', ""), where))
    return "".join(texts)
