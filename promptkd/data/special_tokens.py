"""Special tokens around and inside texts, and the tokens of texts that only spell one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

Tokenizer: TypeAlias = Any  # a Hugging Face tokenizer

# Two noncharacters of Unicode, which no text holds, around a special token's number.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
# Texts behind which a text is tokenized that continues another one.
_ANCHORS = ("\n", "a", "0", ".", " ", "the", ")")


def added_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and behind a text, such as begin-of-text."""
    for probe in ("a", "the", "0"):
        bare, full = (tokenizer([probe], add_special_tokens=add)["input_ids"][0] for add in (False, True))
        for place in range(len(full) - len(bare) + 1):
            if bare and full[place : place + len(bare)] == bare:
                return list(full[:place]), list(full[place + len(bare) :])
    return [], []


class SpecialTokens:
    """The spelling of a tokenizer's special tokens, and tokenization that treats them as text.

    A chat template writes special tokens, and so may a user. To tell them apart, `mark` replaces those of a user's
    text before the template is rendered. A marked prompt is a text in which only the template's special tokens are
    spelled.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.ids = {token.content: number for number, token in added.items() if token.special}
        self._flags = {token.content: (token.lstrip, token.rstrip) for token in added.values()}
        self._names = sorted(self.ids, key=len, reverse=True)
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")

    def count(self, text: str) -> int:
        """Return how many special tokens a text spells."""
        return len(self._pattern.findall(text))

    def mark(self, value: Any) -> Any:
        """Mark the special tokens in a text, or in all texts of a row's lists and objects."""
        if isinstance(value, str):
            return self._pattern.sub(lambda match: f"{_OPEN}{self._numbers[match[0]]}{_CLOSE}", value)
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        return value

    def unmark(self, text: str) -> str:
        """Return a marked prompt as a text."""
        return _MARK.sub(lambda match: self._names[int(match[1])], text) if _OPEN in text else text

    @staticmethod
    def has_marks(text: str) -> bool:
        """Return whether a prompt holds special tokens that are to stay text."""
        return _MARK.search(text) is not None

    def tokenize(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        """Return the ids of texts, without special tokens around them."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False, **options)[
            "input_ids"
        ]
        return ids

    def plain_ids(self, text: str) -> list[int]:
        """Return the ids of a text in which a special token's name is ordinary text."""
        ids = self.tokenize([text], split_special_tokens=True)[0]
        special = {token for name, token in self.ids.items() if name in text}
        if special.isdisjoint(ids):
            return ids
        # The vocabulary has the name as a word, too: cut it behind its first character.
        ends = [match.start() + 1 for match in self._pattern.finditer(text)]
        first, *others = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)]) if start < end]
        return self.plain_ids(first) + [token for piece in others for token in next(self.continuations(piece))]

    def continuations(self, text: str) -> Iterator[list[int]]:
        """Yield ids of a text that continues other tokens, the likeliest first. Special tokens are ordinary text."""
        for anchor in _ANCHORS:
            before, both = self.plain_ids(anchor), self.plain_ids(anchor + text)
            if both[: len(before)] == before:
                yield both[len(before) :]
        yield self.plain_ids(text)
        for anchor in _ANCHORS[1:]:  # each character on its own, where every anchor merges with the first one
            before = self.plain_ids(anchor)
            heads = [self.plain_ids(anchor + character) for character in text]
            if all(ids[: len(before)] == before for ids in heads):
                yield [token for ids in heads for token in ids[len(before) :]]

    def ids_of_marked(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """Return the ids of a marked prompt, and of the prompt with its response, whose special tokens are text."""
        ids: list[int] = []
        begin, strip_left, starts_text = 0, False, True
        for match in self._pattern.finditer(prompt):
            strip_right, strips_next = self._flags[match[0]]
            text = self.unmark(prompt[begin : match.start()])
            text = text.lstrip() if strip_left else text
            ids += [*self._text_ids(text.rstrip() if strip_right else text, starts_text), self.ids[match[0]]]
            begin, strip_left, starts_text = match.end(), strips_next, self._starts_text_behind(match[0])
        rest = self.unmark(prompt[begin:])
        rest = rest.lstrip() if strip_left else rest
        return ids + self._text_ids(rest, starts_text), ids + self._text_ids(rest + response, starts_text)

    def _starts_text_behind(self, name: str) -> bool:
        """Return whether a text behind a special token is tokenized like one at the beginning (Metaspace may)."""
        return self.tokenize([f"{name}a"])[0] == [self.ids[name], *self.tokenize(["a"])[0]]

    def _text_ids(self, text: str, starts_text: bool) -> list[int]:
        if not text:
            return []
        return self.plain_ids(text) if starts_text else next(self.continuations(text))
