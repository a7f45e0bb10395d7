"""Rows as people have them: every shape becomes one `Row`.

| shape | fields |
|---|---|
| instruction | `instruction`, `input` or `context`, and `output`, `response` or `completion` |
| ready prompt | `prompt` (a text) and `output`, `response` or `completion` |
| conversation | `messages` or `conversations`: lists of role and content, or of from and value |
| conversational prompt | `prompt` as a list of messages, `completion` as one, or a response as above |

`system` and `history` ([question, answer] pairs, or messages) may stand beside each of them. In a conversation the last
assistant turn is the response, and what stands before it is the prompt. A field that is null counts as absent. A
response may be a list of texts: the first is trained, all are references.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from promptkd.data.messages import (
    ANSWERED_BY,
    check_text,
    is_empty,
    is_messages,
    read_history,
    read_messages,
    shape_error,
    unread_parts,
)
from promptkd.errors import UserError

CONVERSATIONS = ("messages", "conversations", "conversation")
RESPONSES = ("output", "response", "completion")
INPUTS = ("input", "context")
NATIVE = {"instruction", "input", "prompt", "output", "response"}  # read without a word
# Fields that describe a row. No answer needs them.
HARMLESS = {
    "id", "idx", "index", "uid", "uuid", "guid", "prompt_id", "conversation_id", "category", "topic", "source",
    "dataset", "dataset_name", "origin", "language", "lang", "license", "url", "task", "task_name", "split", "tags",
    "metadata", "meta", "created_at", "timestamp", "model", "score", "quality",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One example before it becomes tokens.

    Attributes:
        prompt: A prompt that is ready, or None. Beside turns, it is what a template made of them earlier.
        system: The system message, "" where there is none.
        turns: The conversation before the response, as {"role", "content"}; the last one asks. The system message
            is not among them.
        input: The published template's input. It belongs to the last turn.
        tools: What a chat template may offer to the model.
        references: Gold texts, of which the first is trained. Empty where the row has none.
        read: The fields that were read, in the order of the row.
        unread: The fields that were not read and that an answer may need.
    """

    prompt: str | None = None
    system: str = ""
    turns: tuple[dict[str, Any], ...] = ()
    input: str = ""
    tools: list[Any] | None = None
    references: list[str] = field(default_factory=list)
    read: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation before the response, as a chat template takes it: the input below the last turn."""
        said = list(self.turns)
        if self.input:
            asked = said[-1]["content"]
            said[-1] = {**said[-1], "content": f"{asked}\n\n{self.input}" if asked else self.input}
        return [*([{"role": "system", "content": self.system}] if self.system else []), *said]

    def fields(self, prompt: str) -> dict[str, Any]:
        """The row as jsonl beside token files: what a template makes prompts of, and the `prompt` it made."""
        *history, last = self.turns or [None]
        row: dict[str, Any] = {}
        if last is not None and last["role"] != "user":
            row = {"messages": list(self.turns), "prompt": prompt}
        elif last is not None:
            row = {"instruction": last["content"], "prompt": prompt, "input": self.input}
            row |= {"history": history} if history else {}
        else:
            row = {"prompt": prompt}
        row |= {"system": self.system} if self.system and last is not None else {}
        row |= {"tools": self.tools} if self.tools else {}
        return row | {"output": self.references if len(self.references) > 1 else self.references[0]}


def read_row(raw: dict[str, Any], where: str = "row") -> Row:
    """Read one row of any shape.

    Args:
        raw: The row as its file has it.
        where: The file and the place in it, for errors.

    Returns:
        The row. Its `references` are empty where it has no response; `reference_texts` refuses that.

    Raises:
        UserError: The row has no prompt, or a field of it cannot be read.
    """
    fields = {key: value for key, value in raw.items() if value is not None}
    talk, keys = _conversation(fields, where)
    references, answered = _references(fields, talk, where)
    rest = []
    if talk is not None:
        turns, rest = _before_response(talk, answered, references, keys, where)
    elif "instruction" in fields:
        keys = ["instruction"]
        turns = [{"role": "user", "content": check_text(fields["instruction"], "instruction", where)}]
    else:
        turns = []
    ready = _ready_prompt(fields, where, needed=not turns)
    if ready is not None and (talk is None or answered in RESPONSES):
        keys = [*keys, "prompt"]
    else:
        ready = None
    system, turns = _system(fields, turns, where)
    if history := read_history(fields.get("history"), where):
        if not turns:  # the prompt is the last question of a conversation, and no ready prompt
            turns, ready = [{"role": "user", "content": ready}], None
        turns = [*history, *turns]
    if talk is not None and all(turn["role"] == "system" for turn in turns):
        raise UserError(f"{where}: nothing is asked before its response: give it a user's turn")
    source, below = _input(fields, turns, where)
    tools = _tools(fields, where)
    used = {*keys, answered, source, *(key for key in ("system", "history", "tools") if fields.get(key))}
    parts = [f"{key}, {name}" for key in used if key in fields for name in unread_parts(fields[key])]
    unread = [*_unread(fields, used, turns, references), *rest, *sorted(parts)]
    read = tuple(key for key in fields if key in used)
    return Row(ready, system, tuple(turns), below, tools, references, read, tuple(unread))


def reference_texts(raw: dict[str, Any] | Row, where: str = "row") -> list[str]:
    """The gold texts of a row, of any shape. Raises `UserError` where it has none."""
    if isinstance(raw, Row):
        found, fields = raw.references, dict.fromkeys(raw.read)
    else:
        fields = {key: value for key, value in raw.items() if value is not None}
        found, _ = _references(fields, _conversation(fields, where)[0], where)
    if not found:
        raise UserError(f'{where}: it has no "output" (or "response", "completion"), only {key_names(fields)}')
    return found


def key_names(fields: dict[str, Any]) -> str:
    """The first keys of a row, for an error."""
    return ", ".join(f'"{key}"' for key in islice(fields, 8)) or "no key at all"


def _conversation(fields: dict[str, Any], where: str) -> tuple[list[dict[str, Any]] | None, list[str]]:
    """The messages of a row and the fields they came from; None where it is no conversation."""
    complete = "instruction" in fields and any(key in fields for key in RESPONSES)
    key = next((key for key in CONVERSATIONS if fields.get(key)), None)
    if key is not None and not complete:
        return read_messages(fields[key], key, where), [key]
    if is_messages(fields.get("prompt")):
        said = read_messages(fields["prompt"], "prompt", where)
        if is_messages(fields.get("completion")):
            return [*said, *read_messages(fields["completion"], "completion", where)], ["prompt", "completion"]
        return said, ["prompt"]
    return None, []


def _references(fields: dict[str, Any], talk: list[dict[str, Any]] | None, where: str) -> tuple[list[str], str | None]:
    """The gold texts, and where they were found: a field, `ANSWERED_BY` for a conversation, None for nowhere."""
    key = next((key for key in RESPONSES if key in fields), None)
    if key is None or (talk is not None and key == "completion" and is_messages(fields[key])):
        answers = [turn for turn in talk or [] if turn["role"] == ANSWERED_BY]
        if talk is not None and key == "completion" and talk[-1]["role"] != ANSWERED_BY:
            raise UserError(f'{where}: the last message of its "completion" has to be the assistant\'s')
        if answers and not answers[-1]["content"]:
            raise UserError(f"{where}: the last turn of its assistant has no text (a tool call?): leave the row out")
        return ([answers[-1]["content"]], ANSWERED_BY) if answers else ([], None)
    value = fields[key]
    if is_messages(value):  # a completion behind a prompt that is a text
        said = read_messages(value, key, where)
        if len(said) != 1 or said[0]["role"] != ANSWERED_BY:
            raise UserError(f'{where}: its "{key}" has to be one message of the assistant, beside a prompt in text')
        return [said[0]["content"]], key
    if not isinstance(value, list):
        return [check_text(value, key, where)], key
    if not value:
        raise UserError(f'{where}: its list "{key}" is empty: give it a text')
    return [check_text(text, key, where) for text in value], key


def _before_response(
    talk: list[dict[str, Any]], answered: str | None, references: list[str], keys: list[str], where: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """The turns before the response, and what of the conversation is not read."""
    last = max((place for place, turn in enumerate(talk) if turn["role"] == ANSWERED_BY), default=None)
    named = " and ".join(f'"{key}"' for key in keys)
    if answered != ANSWERED_BY:
        if last is None or last < len(talk) - 1:
            return talk, []
        if answered is None or talk[last]["content"] != references[0]:
            raise UserError(f'{where}: it has an answer in {named} and another in "{answered}": leave one out')
    turns, rest = talk[:last], []
    if not turns:
        raise UserError(f"{where}: nothing stands before the assistant's turn in its {named}: give it a user's turn")
    if last < len(talk) - 1:
        rest = [f"{keys[-1]} behind the last assistant turn"]
    rest += [f"{keys[-1]}, {name} of the response" for name in talk[last] if name not in ("role", "content", "name")]
    return turns, rest


def _ready_prompt(fields: dict[str, Any], where: str, needed: bool) -> str | None:
    """The row's own prompt, if it is a text. Raises UserError where the row has nothing else, or it is empty."""
    if "prompt" not in fields or is_messages(fields["prompt"]):
        if needed:
            if set(fields) - HARMLESS == {"text"}:
                raise UserError(
                    f'{where}: it has a "text" and nothing else, in which prompt and response cannot be told apart: '
                    'split it into "prompt" and "response"'
                )
            raise UserError(f'{where}: it has neither "instruction" nor "prompt", only {key_names(fields)}')
        return None
    prompt = check_text(fields["prompt"], "prompt", where)
    if not prompt:
        raise UserError(f'{where}: its "prompt" is empty: give it a text')
    return prompt


def _system(fields: dict[str, Any], turns: list[dict[str, Any]], where: str) -> tuple[str, list[dict[str, Any]]]:
    """The system message, from its field or from the head of the conversation, and the other turns."""
    system = check_text(fields.get("system", ""), "system", where)
    if not turns or turns[0]["role"] != "system":
        return system, turns
    said = turns[0]["content"]
    if system and said != system:
        raise UserError(f'{where}: it has a "system" and another system message in its conversation: leave one out')
    return said, turns[1:]


def _input(fields: dict[str, Any], turns: list[dict[str, Any]], where: str) -> tuple[str | None, str]:
    """Which field holds the input of the last turn, and its text."""
    texts = {key: check_text(fields[key], key, where) for key in INPUTS if key in fields}
    filled = {key: text for key, text in texts.items() if text}
    if len(set(filled.values())) > 1:
        raise UserError(f'{where}: it has an "input" and another "context": leave one out')
    if not filled:
        return next(iter(texts), None), ""
    key = next(iter(filled))
    if not turns:  # a ready prompt holds its input
        return (key, "") if key == "input" else (None, "")
    if turns[-1]["role"] != "user":
        raise UserError(f'{where}: its "{key}" belongs to a user\'s turn, but the last one is of {turns[-1]["role"]}')
    return key, filled[key]


def _tools(fields: dict[str, Any], where: str) -> list[Any] | None:
    tools = fields.get("tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise shape_error(where, "tools", "a list of objects", tools)
    return tools


def _unread(fields: dict[str, Any], used: set[Any], turns: list[dict[str, Any]], references: list[str]) -> list[str]:
    """Fields that were not read, but for those that repeat what was and those that no answer needs."""
    said = [turn["content"] for turn in turns] + references[:1]
    found = []
    for key, value in fields.items():
        if key in used or key.lower() in HARMLESS or is_empty(value):
            continue
        repeats = key in ("text", "prompt", *INPUTS, *RESPONSES) and isinstance(value, str)
        if repeats and (value in said or (key == "text" and references and references[0] in value)):
            continue
        found.append(key)
    return found
