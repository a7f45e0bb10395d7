"""Rows of every common shape, and the prompts that the published template makes of them.

| shape | fields |
|---|---|
| instruction | `instruction`, `input` or `context`, and `output`, `response` or `completion` |
| ready prompt | `prompt` (a text) and `output`, `response` or `completion` |
| conversation | `messages` or `conversations`: lists of role and content, or of from and value |
| conversational prompt | `prompt` as a list of messages, `completion` as one, or a response as above |

`system` and `history` ([question, answer] pairs, or messages) may accompany each of them. In a conversation the last
assistant turn is the response, and the turns before it are the prompt. A field that is null counts as absent. A
response may be a list of texts: the first is trained, all are references.

The published template has a place for an instruction and an input. A system message goes before the first instruction,
within its section. Turns of a history become sections of their own. The system message of a ready prompt precedes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from promptkd.data.messages import (
    ASSISTANT,
    Message,
    check_text,
    is_empty,
    is_messages,
    read_history,
    read_messages,
    read_tools,
    unread_parts,
)
from promptkd.errors import UserError

CONVERSATIONS = ("messages", "conversations", "conversation")
RESPONSES = ("output", "response", "completion")
INPUTS = ("input", "context")
# Fields that describe a row. No answer needs them.
HARMLESS = {
    "id", "idx", "index", "uid", "uuid", "guid", "prompt_id", "conversation_id", "category", "topic", "source",
    "dataset", "dataset_name", "origin", "language", "lang", "license", "url", "task", "task_name", "split", "tags",
    "metadata", "meta", "created_at", "timestamp", "model", "score", "quality",
}  # fmt: skip
SECTIONS = {"user": "### Instruction:\n", ASSISTANT: "### Response:\n"}
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Row:
    """One example before it becomes tokens.

    Attributes:
        prompt: A ready prompt, or None. Beside turns, an earlier template made it of them.
        system: The system message, "" for none.
        turns: The conversation before the response, as {"role", "content"}, without the system message.
        input: The input of the published template. It belongs to the last turn.
        tools: The tools that a chat template offers to the model.
        references: Gold texts, of which the first is trained. Empty where the row has none.
        read: The fields that were read, in the order of the row.
        unread: The fields that were not read and that an answer may need.
    """

    prompt: str | None = None
    system: str = ""
    turns: tuple[Message, ...] = ()
    input: str = ""
    tools: list[Any] | None = None
    references: list[str] = field(default_factory=list)
    read: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def messages(self) -> list[Message]:
        """The conversation before the response for a chat template, with the input below the last turn."""
        turns = list(self.turns) or [{"role": "user", "content": self.prompt}]
        if self.input:
            content = turns[-1]["content"]
            turns[-1] = {**turns[-1], "content": f"{content}\n\n{self.input}" if content else self.input}
        return [*([{"role": "system", "content": self.system}] if self.system else []), *turns]

    def fields(self, prompt: str) -> dict[str, Any]:
        """Return the row for the jsonl beside token files: the source of its prompt, and the `prompt` itself."""
        row: dict[str, Any] = {"prompt": prompt}
        if self.turns and self.turns[-1]["role"] == "user":
            *history, last = self.turns
            row = {"instruction": last["content"], "prompt": prompt, "input": self.input}
            row |= {"history": history} if history else {}
        elif self.turns:
            row = {"messages": list(self.turns), "prompt": prompt}
        row |= {"system": self.system} if self.system and self.turns else {}
        row |= {"tools": self.tools} if self.tools else {}
        return row | {"output": self.references if len(self.references) > 1 else self.references[0]}


def read_row(raw: dict[str, Any], where: str = "row") -> Row:
    """Read one row of any shape.

    Args:
        raw: The row as in its file.
        where: The file and the place in it, for errors.

    Returns:
        The row. Its `references` are empty where it has no response; `reference_texts` refuses that.

    Raises:
        UserError: The row has no prompt, or a field of it cannot be read.
    """
    fields = {key: value for key, value in raw.items() if value is not None}
    conversation, keys = _conversation(fields, where)
    references, answered = _references(fields, conversation, where)
    turns: list[Message] = []
    rest: list[str] = []
    if conversation is not None:
        turns, rest = _before_response(conversation, answered, references, keys, where)
    elif "instruction" in fields:
        keys = ["instruction"]
        turns = [{"role": "user", "content": check_text(fields["instruction"], "instruction", where)}]
    prompt = _ready_prompt(fields, where, needed=not turns)
    if conversation is not None and answered not in RESPONSES:
        prompt = None
    keys += ["prompt"] if prompt is not None else []
    system, turns = _system(fields, turns, where)
    if history := read_history(fields.get("history"), where):
        if not turns:  # the prompt is the last question of the conversation
            turns, prompt = [{"role": "user", "content": prompt}], None
        turns = [*history, *turns]
    if conversation is not None and all(turn["role"] == "system" for turn in turns):
        raise UserError(f"{where}: nothing is asked before its response: give it a user's turn")
    input_key, text = _input(fields, turns, where)
    tools = read_tools(fields.get("tools"), where)
    used = {*keys, answered, input_key, *(key for key in ("system", "history", "tools") if fields.get(key))}
    parts = [f"{key}, {name}" for key in used - {"tools"} if key in fields for name in unread_parts(fields[key])]
    unread = [*_unread(fields, used, turns, references), *rest, *sorted(parts)]
    read = tuple(key for key in fields if key in used)
    return Row(prompt, system, tuple(turns), text, tools, references, read, tuple(unread))


def reference_texts(raw: dict[str, Any], where: str = "row") -> list[str]:
    """Return the gold texts of a row of any shape. Raise UserError where it has none."""
    fields = {key: value for key, value in raw.items() if value is not None}
    references, _ = _references(fields, _conversation(fields, where)[0], where)
    if not references:
        raise UserError(f'{where}: it has no "output" (or "response", "completion"), only {key_names(fields)}: add one')
    return references


def render_prompt(row: Row, where: str = "row") -> str:
    """Return a row's ready prompt, or the published template filled with its conversation.

    Raises:
        UserError: The template has no place for what the row holds.
    """
    if row.prompt is not None:
        return f"{row.system}\n\n{row.prompt}" if row.system and not row.turns else row.prompt
    roles = [turn["role"] for turn in row.turns]
    if row.tools or not set(roles) <= set(SECTIONS) or roles[-1] != "user" or any("tool_calls" in t for t in row.turns):
        held = '"tools"' if row.tools else f"turns of {', '.join(dict.fromkeys(roles))}, the last of {roles[-1]}"
        raise UserError(f"{where}: it has {held}, for which the published template has no place: --template chat")
    texts = [turn["content"] for turn in row.turns]
    if row.system:
        first = roles.index("user")
        texts[first] = f"{row.system}\n\n{texts[first]}"
    history = "".join(f"{SECTIONS[role]}{text}\n\n" for role, text in zip(roles, texts[:-1]))
    filled = (WITH_INPUT if row.input else WITHOUT_INPUT).format(instruction=texts[-1], input=row.input)
    preamble, section, rest = filled.partition(SECTIONS["user"])
    return preamble + history + section + rest


def key_names(fields: dict[str, Any]) -> str:
    """Name the first keys of a row, for an error."""
    return ", ".join(f'"{key}"' for key in islice(fields, 8)) or "no key at all"


def _conversation(fields: dict[str, Any], where: str) -> tuple[list[Message] | None, list[str]]:
    """Return the messages of a row and the fields they came from; None where it is not a conversation."""
    complete = "instruction" in fields and any(key in fields for key in RESPONSES)
    key = next((key for key in CONVERSATIONS if fields.get(key)), None)
    if key is not None and not complete:
        return read_messages(fields[key], key, where), [key]
    if not is_messages(fields.get("prompt")):
        return None, []
    keys = ["prompt", "completion"] if is_messages(fields.get("completion")) else ["prompt"]
    return [message for key in keys for message in read_messages(fields[key], key, where)], keys


def _references(fields: dict[str, Any], conversation: list[Message] | None, where: str) -> tuple[list[str], str | None]:
    """Return the gold texts and their source: a field, `ASSISTANT` for a conversation's turn, None for no source."""
    key = next((key for key in RESPONSES if key in fields), None)
    if key is None or (conversation is not None and key == "completion" and is_messages(fields[key])):
        answers = [turn for turn in conversation or [] if turn["role"] == ASSISTANT]
        if conversation is not None and key == "completion" and conversation[-1]["role"] != ASSISTANT:
            raise UserError(f'{where}: the last message of its "completion" has to be the assistant\'s')
        if answers and not answers[-1]["content"]:
            raise UserError(f"{where}: the last turn of its assistant has no text (a tool call?): leave the row out")
        return ([answers[-1]["content"]], ASSISTANT) if answers else ([], None)
    value = fields[key]
    if is_messages(value):  # a completion behind a prompt that is a text
        messages = read_messages(value, key, where)
        if len(messages) != 1 or messages[0]["role"] != ASSISTANT:
            raise UserError(f'{where}: its "{key}" has to be one message of the assistant, beside a prompt in text')
        return [messages[0]["content"]], key
    if value == []:
        raise UserError(f'{where}: its list "{key}" is empty: give it a text')
    return [check_text(text, key, where) for text in (value if isinstance(value, list) else [value])], key


def _before_response(
    conversation: list[Message], answered: str | None, references: list[str], keys: list[str], where: str
) -> tuple[list[Message], list[str]]:
    """Return the turns before the response, and the parts of the conversation that are not read."""
    last = max((place for place, turn in enumerate(conversation) if turn["role"] == ASSISTANT), default=None)
    if answered != ASSISTANT and (last is None or last < len(conversation) - 1):
        return conversation, []
    assert last is not None  # an assistant's turn is the response
    named = " and ".join(f'"{key}"' for key in keys)
    if answered != ASSISTANT and (answered is None or conversation[last]["content"] != references[0]):
        raise UserError(f'{where}: it has an answer in {named} and another in "{answered}": leave one out')
    if last == 0:
        raise UserError(f"{where}: nothing stands before the assistant's turn in its {named}: give it a user's turn")
    rest = [f"{keys[-1]} behind the last assistant turn"] if last < len(conversation) - 1 else []
    rest += [
        f"{keys[-1]}, {name} of the response" for name in conversation[last] if name not in ("role", "content", "name")
    ]
    return conversation[:last], rest


def _ready_prompt(fields: dict[str, Any], where: str, needed: bool) -> str | None:
    """Return the row's `prompt` if it is a text. Raise UserError where it is empty, or missing and `needed`."""
    if "prompt" in fields and not is_messages(fields["prompt"]):
        prompt = check_text(fields["prompt"], "prompt", where)
        if not prompt:
            raise UserError(f'{where}: its "prompt" is empty: give it a text')
        return prompt
    if needed and set(fields) - HARMLESS == {"text"}:
        raise UserError(
            f'{where}: it has a "text" and nothing else, in which prompt and response cannot be told apart: '
            'split it into "prompt" and "response"'
        )
    if needed:
        raise UserError(f'{where}: it has neither "instruction" nor "prompt", only {key_names(fields)}: add one')
    return None


def _system(fields: dict[str, Any], turns: list[Message], where: str) -> tuple[str, list[Message]]:
    """Return the system message, from its field or the first message, and the other turns."""
    system = check_text(fields.get("system", ""), "system", where)
    if not turns or turns[0]["role"] != "system":
        return system, turns
    content = turns[0]["content"]
    if system and content != system:
        raise UserError(f'{where}: it has a "system" and another system message in its conversation: leave one out')
    return content, turns[1:]


def _input(fields: dict[str, Any], turns: list[Message], where: str) -> tuple[str | None, str]:
    """Return the field with the input of the last turn, and its text."""
    texts = {key: check_text(fields[key], key, where) for key in INPUTS if key in fields}
    filled = {key: text for key, text in texts.items() if text}
    if len(set(filled.values())) > 1:
        raise UserError(f'{where}: it has an "input" and another "context": leave one out')
    if not filled:
        return next(iter(texts), None), ""
    key = next(iter(filled))
    if not turns:  # a ready prompt includes its input
        return (key, "") if key == "input" else (None, "")
    if turns[-1]["role"] != "user":
        raise UserError(f'{where}: its "{key}" belongs to a user\'s turn, but the last one is of {turns[-1]["role"]}')
    return key, filled[key]


def _unread(fields: dict[str, Any], used: set[Any], turns: list[Message], references: list[str]) -> list[str]:
    """Return the unread fields, without those that repeat a text of the row and those that no answer needs."""
    texts = [turn["content"] for turn in turns] + references[:1]
    unread = []
    for key, value in fields.items():
        if key in used or key.lower() in HARMLESS or is_empty(value):
            continue
        may_repeat = key in ("text", "prompt", *INPUTS, *RESPONSES) and isinstance(value, str)
        if may_repeat and (value in texts or (key == "text" and references and references[0] in value)):
            continue
        unread.append(key)
    return unread
