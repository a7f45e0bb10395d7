"""Conversations in a row: lists of messages of every common shape become {"role", "content"} with a text."""

from __future__ import annotations

from typing import Any

from promptkd.errors import UserError

ANSWERED_BY = "assistant"
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
# Other parts of a message that chat templates read.
CARRIED = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "reasoning")


def is_messages(value: Any) -> bool:
    """Whether a field is a list of messages, and no list of texts."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def read_messages(value: Any, key: str, where: str) -> list[dict[str, Any]]:
    """Read the messages of a field.

    Args:
        value: A list of {"role", "content"} or {"from", "value"}. A content is a text or a list of text parts.
        key: The field's name, for errors.
        where: The row's file and place, for errors.

    Returns:
        {"role", "content"} with a text each, and what `CARRIED` names.

    Raises:
        UserError: It is no such list, a role is unknown, or a content is no text.
    """
    if not is_messages(value):
        raise shape_error(where, key, "a list of messages", value)
    return [_message(item, f'message {place} of "{key}"', where) for place, item in enumerate(value, 1)]


def unread_parts(value: Any) -> list[str]:
    """The parts of messages that `read_messages` does not read, where any has a value."""
    items = value if is_messages(value) else []
    known = ("role", "from", "content", "value", "id", *CARRIED)
    return [*dict.fromkeys(key for item in items for key in item if key not in known and not is_empty(item[key]))]


def is_empty(value: Any) -> bool:
    """Whether a field says nothing. A zero says something."""
    return value is None or value is False or value in ("", [], {})


def read_history(value: Any, where: str) -> list[dict[str, Any]]:
    """Read the turns before the last question: messages, or [question, answer] pairs. Empty for none."""
    if not value:
        return []
    if is_messages(value):
        return read_messages(value, "history", where)
    pairs = isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    if not pairs:
        raise shape_error(where, "history", "a list of [question, answer] pairs or of messages", value)
    roles = ("user", ANSWERED_BY)
    return [
        {"role": role, "content": check_text(text, "history", where)}
        for pair in value
        for role, text in zip(roles, pair)
    ]


def check_text(value: Any, key: str, where: str) -> str:
    """The value, if it is a text that can be written down."""
    if not isinstance(value, str):
        raise shape_error(where, key, "a text", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f'{where}: "{key}" holds half a character (a lone surrogate): correct it') from None
    return value


def shape_error(where: str, key: str, wanted: str, value: Any) -> UserError:
    """What to say of a field that holds another kind of value."""
    return UserError(f'{where}: "{key}" has to be {wanted}, not {type(value).__name__}')


def _message(item: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    role = item.get("role") if item.get("role") is not None else item.get("from")
    if not isinstance(role, str) or role.lower() not in ROLES:
        shown = "no role" if role is None else f"the role {str(role)[:40]!r}"
        raise UserError(f"{where}: {name} has {shown}: give it one of {', '.join(dict.fromkeys(ROLES.values()))}")
    content = item.get("content") if item.get("content") is not None else item.get("value")
    if content is None and item.get("tool_calls"):
        content = ""
    carried = {key: item[key] for key in CARRIED if not is_empty(item.get(key))}
    return {"role": ROLES[role.lower()], "content": _content(content, name, where), **carried}


def _content(content: Any, name: str, where: str) -> str:
    """A message's text; the texts of a list of parts, one behind the other."""
    if not isinstance(content, list):
        if not isinstance(content, str):
            raise UserError(f"{where}: the content of {name} has to be a text, not {type(content).__name__}")
        return check_text(content, name.replace('"', ""), where)
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(check_text(part, name.replace('"', ""), where))
        elif isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(check_text(part["text"], name.replace('"', ""), where))
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(f"{where}: {name} has content of the type {str(kind)[:40]!r}: only text can be read")
    return "".join(texts)
