"""Special tokens around and inside texts: which ones a tokenizer adds, and text that only spells one."""

from __future__ import annotations

import re
from typing import Any

# Two noncharacters of Unicode, which no text holds, around a special token's number.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


def added_around(tokenizer) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and behind a text, such as begin-of-text."""
    for probe in ("a", "the", "0"):
        bare, full = (tokenizer([probe], add_special_tokens=add)["input_ids"][0] for add in (False, True))
        for place in range(len(full) - len(bare) + 1):
            if bare and full[place : place + len(bare)] == bare:
                return list(full[:place]), list(full[place + len(bare) :])
    return [], []


class SpecialTokens:
    """The special tokens of a tokenizer as they are spelled.

    A chat template writes special tokens, and so may a user. To tell them apart, `mark` replaces those of a user's
    text before the template is rendered. A marked prompt is a text in which only the template's special tokens are
    spelled.
    """

    def __init__(self, tokenizer) -> None:
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
            return self._pattern.sub(lambda found: f"{_OPEN}{self._numbers[found[0]]}{_CLOSE}", value)
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        return value

    def unmark(self, text: str) -> str:
        """Return a marked prompt as a text."""
        return _MARK.sub(lambda found: self._names[int(found[1])], text) if _OPEN in text else text

    def broken(self, text: str) -> list[str]:
        """Cut a text behind the first character of each special token that it spells."""
        ends = [found.start() + 1 for found in self._pattern.finditer(text)]
        return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)]) if start < end]

    @staticmethod
    def has_marks(text: str) -> bool:
        """Return whether a prompt holds special tokens that are to stay text."""
        return _MARK.search(text) is not None

    def split(self, marked: str) -> tuple[list[tuple[str, int]], str]:
        """Split a marked prompt at its special tokens.

        Returns:
            The texts before special tokens, each with that token's id, and the text behind the last one. The texts
            are stripped where the tokenizer does that beside a special token.
        """
        parts: list[tuple[str, int]] = []
        end, strip_left = 0, False
        for found in self._pattern.finditer(marked):
            left, right = self._flags[found[0]]
            text = self.unmark(marked[end : found.start()])
            text = text.lstrip() if strip_left else text
            parts.append((text.rstrip() if left else text, self.ids[found[0]]))
            end, strip_left = found.end(), right
        rest = self.unmark(marked[end:])
        return parts, rest.lstrip() if strip_left else rest
