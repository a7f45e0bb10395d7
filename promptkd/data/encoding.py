"""From rows to token ids, for training, the dev set, evaluation, rollouts and generation.

The rule for a prompt ("own"): its text's tokens, preceded once by the special tokens that the tokenizer puts before a
text (begin-of-text). They are left out where the text begins with them already, and where the tokenizer's chat template
made the prompt, because a template writes all special tokens itself. Special tokens that a tokenizer puts behind a text
are never part of a prompt. "none" adds nothing in front. "published" is the published code: nothing is added in
training, everything in evaluation, and the response begins where the separately tokenized prompt ends.

Text stays text: a special token that an instruction, an input or a response spells is tokenized as ordinary text.
Special tokens of chat templates and of ready prompts are special.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from promptkd.data.row_files import read_rows, say
from promptkd.data.rows import Row, key_names, read_row, reference_texts
from promptkd.data.special_tokens import SpecialTokens, Tokenizer, added_around
from promptkd.data.templates import Template, end_of_turn_id, find_chat_template, template_of
from promptkd.data.token_file import Ids
from promptkd.errors import UserError

NATIVE = {"instruction", "input", "prompt", "output", "response"}  # fields that are read without a note
_NOTES = {
    "shortened": "shortened (the response is cut at --max-length)",
    "spelled": "spell a special token, which stays text (see --special-tokens)",
    "altered": "have a response that this tokenizer changes behind its prompt",
}


class Encoded(NamedTuple):
    """An example's token ids, int64, the response with the token that ends it.

    Attributes:
        spelled: A text of the row spells a special token, which stays text.
        altered: No tokens of the response give its text exactly behind this prompt.
    """

    prompt: Ids
    response: Ids
    spelled: bool = False
    altered: bool = False

    def within(self, max_length: int | None) -> tuple[Ids, Ids]:
        """Return prompt and response, the response cut so that both have at most `max_length` tokens."""
        room = None if max_length is None else max(max_length - len(self.prompt), 0)
        return self.prompt, self.response[:room]


@dataclass
class RowCounts:
    """Numbers of rows, printed once and written into the run's record.

    Attributes:
        read: Rows that were looked at.
        dropped: Rows left out because their prompt is over --max-prompt-length.
        shortened: Rows whose response is cut at --max-length.
        spelled: Rows of which a text spells a special token, which stays text.
        altered: Rows whose response cannot follow their prompt without a change of the text.
    """

    read: int = 0
    dropped: int = 0
    shortened: int = 0
    spelled: int = 0
    altered: int = 0

    def take(self, encoded: Encoded, max_prompt_length: int, max_length: int | None) -> bool:
        """Count a row, and return whether it is kept."""
        self.read += 1
        if len(encoded.prompt) > max_prompt_length:
            self.dropped += 1
            return False
        self.shortened += max_length is not None and len(encoded.prompt) + len(encoded.response) > max_length
        self.spelled += encoded.spelled
        self.altered += encoded.altered
        return True

    def others(self) -> list[str]:
        """Return a note for each count besides the dropped rows."""
        return [f"{count:,} {text}" for name, text in _NOTES.items() if (count := getattr(self, name))]

    def __str__(self) -> str:
        """Return all notes in one line, "" where every row is used unchanged."""
        dropped = [f"{self.dropped:,} dropped (the prompt is over --max-prompt-length)"] if self.dropped else []
        notes = [*dropped, *self.others()]
        return f"of {self.read:,} rows {', '.join(notes)}" if notes else ""


@dataclass
class FieldCounts:
    """The fields of a source's rows that were read, and in how many rows others were not."""

    read: dict[str, None] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row) -> None:
        """Count a row's fields."""
        self.read.update(dict.fromkeys(row.read))
        self.unread.update(row.unread)

    def say(self, source: str | Path) -> None:
        """Print one line, unless all fields were read and the shapes are those that this project writes."""
        if self.unread or not set(self.read) <= NATIVE:
            unread = ", ".join(f'"{name}" of {count} rows' for name, count in self.unread.most_common()) or "none"
            say(f"{source}: read as {key_names(self.read)}; fields not read: {unread}")


class PromptText(NamedTuple):
    """The texts of a row.

    Attributes:
        where: The file and place, for errors.
        prompt: The marked prompt, see `SpecialTokens`.
        references: The gold texts.
        row: The row.
    """

    where: str
    prompt: str
    references: list[str]
    row: Row


class TextEncoder:
    """Makes token ids of prompts and responses.

    Args:
        tokenizer: A Hugging Face tokenizer.
        rule: "own", "none" or "published"; see the module's text.
    """

    def __init__(self, tokenizer: Tokenizer, rule: str = "own") -> None:
        self.tokenizer, self.rule = tokenizer, rule
        self.specials = SpecialTokens(tokenizer)
        self.leading, _ = added_around(tokenizer)
        self.chat = find_chat_template(tokenizer)
        self._end_of_turn = end_of_turn_id(tokenizer)

    def read_source(self, source: str | Path, template: str, limit: int = -1) -> list[PromptText]:
        """Make the prompts of a source's first `limit` rows (-1: all), and say which fields are not read.

        Args:
            source: See `promptkd.data.row_files`.
            template: "published" or "chat".
            limit: The number of rows.
        """
        rows, fields, render = read_rows(source), FieldCounts(), template_of(template, self.tokenizer)
        texts = [self.read(raw, where, render) for where, raw in rows[: limit if limit >= 0 else None]]
        for text in texts:
            fields.add(text.row)
        fields.say(source)
        return texts

    def read(self, raw: dict[str, Any], where: str, render: Template) -> PromptText:
        """Make the prompt of a row.

        Args:
            raw: The row as in its file.
            where: The file and place, for errors.
            render: The template.
        """
        row = read_row(raw, where)
        prompt = render(row, where)
        if self.rule != "published" and self.specials.count(prompt):
            prompt = self._mark(raw, prompt, where, render)
        return PromptText(where, prompt, reference_texts(raw, where), row)

    def is_chat(self, text: str) -> bool:
        """Return whether the tokenizer's chat template made a prompt."""
        return self.chat is not None and self.chat.rendered(text)

    def stop_id(self, text: str) -> int:
        """Return the token that ends the response to a prompt: of a chat template's prompt, the end of the turn."""
        eos: int = self.tokenizer.eos_token_id
        return self._end_of_turn if self.is_chat(text) else eos

    def prompts(self, marked: Sequence[str]) -> list[list[int]]:
        """Return the ids of prompts; an empty list where the text has no token.

        With the rule "published", all special tokens are added as in the published evaluation.
        """
        bare = [ids for ids, _ in self._ids_of_pairs([(prompt, "") for prompt in marked])]
        if self.rule != "published":
            return [[*self._in_front(self.specials.unmark(prompt), ids), *ids] for prompt, ids in zip(marked, bare)]
        full = self.tokenizer(list(marked), add_special_tokens=True, verbose=False)["input_ids"]
        return [few if self.is_chat(text) or not few else every for text, few, every in zip(marked, bare, full)]

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Encode (marked prompt, response) pairs.

        The prompt's ids are those of `prompts`. The response's ids continue them: both together decode to both
        texts. Where the tokens of the joined text begin with the prompt's tokens, they are these tokens.

        Raises:
            UserError: A prompt has no token.
        """
        encoded = []
        for (prompt, response), (ids, joined) in zip(pairs, self._ids_of_pairs(pairs)):
            text = self.specials.unmark(prompt)
            if not ids:
                raise UserError(f"the prompt {text[:40]!r} has no token in this tokenizer: give it a text")
            rest, altered = self._continuation(ids, joined, text, response)
            front = [] if self.rule == "published" else self._in_front(text, ids)
            spelled = self.rule != "published" and (self.specials.has_marks(prompt) or self.specials.count(response))
            prompt_ids = np.array([*front, *ids], dtype=np.int64)
            response_ids = np.array([*rest, self.stop_id(text)], dtype=np.int64)
            encoded.append(Encoded(prompt_ids, response_ids, bool(spelled), altered))
        return encoded

    def _mark(self, raw: dict[str, Any], prompt: str, where: str, render: Template) -> str:
        """Return the prompt of a row with a mark for each special token that its contents spell."""
        if raw.get("prompt") != prompt:  # the template made the prompt of contents
            return render(read_row(self.specials.mark(raw), where), where)
        for key in ("instruction", "input"):  # a template made it earlier of these
            content = raw.get(key)
            if isinstance(content, str) and self.specials.count(content):
                prompt = prompt.replace(content.strip(), self.specials.mark(content.strip()))
        return prompt

    def _in_front(self, text: str, ids: list[int]) -> list[int]:
        """Return the special tokens to put in front of a prompt of these ids."""
        if self.rule != "own" or not self.leading or not ids or self.is_chat(text):
            return []
        size = len(self.leading)
        present = next(n for n in range(size, -1, -1) if ids[:n] == self.leading[size - n :])
        return self.leading[: size - present]

    def _ids_of_pairs(self, pairs: Sequence[tuple[str, str]]) -> Iterable[tuple[list[int], list[int]]]:
        """Return the ids of each prompt and of each prompt with its response, without special tokens in front."""
        ordinary = [self.rule == "published" or self._is_ordinary(*pair) for pair in pairs]
        together = [pair for pair, plain in zip(pairs, ordinary) if plain]
        prompts = iter(self.specials.tokenize([prompt for prompt, _ in together]))
        joined = iter(self.specials.tokenize([prompt + response for prompt, response in together]))
        return [
            (next(prompts), next(joined)) if plain else self.specials.ids_of_marked(*pair)
            for pair, plain in zip(pairs, ordinary)
        ]

    def _is_ordinary(self, prompt: str, response: str) -> bool:
        """Return whether a tokenizer sees special tokens only where a template or a ready prompt has them."""
        if self.specials.has_marks(prompt):
            return False
        return self.specials.count(prompt + response) == self.specials.count(prompt)

    def _continuation(self, ids: list[int], joined: list[int], prompt: str, response: str) -> tuple[list[int], bool]:
        """Return the response's ids behind a prompt's, and whether they alter the text."""
        if joined[: len(ids)] == ids or self.rule == "published":
            return joined[len(ids) :], False
        wanted = {prompt + response, self._decode(joined)}
        closest, longest = self.specials.plain_ids(response), -1
        for candidate in self.specials.continuations(response):
            text = self._decode([*ids, *candidate])
            if text in wanted:
                return candidate, False
            shared = max(_common(text, other) for other in wanted)
            if shared > longest:
                closest, longest = candidate, shared
        return closest, True

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _common(one: str, other: str) -> int:
    """Return the number of characters at the beginning that two texts share."""
    return next((place for place, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), min(len(one), len(other)))
