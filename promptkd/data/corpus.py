"""Plain text as rows of tokens: documents one after the other, cut into rows of one length."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from promptkd.data.encoding import TextEncoder
from promptkd.data.workers import Lines
from promptkd.utils.jsonl import decode

NEWLINE_MARK = "<@x(x!>"


@dataclass(frozen=True)
class EncodeDocuments:
    """Numbered lines of text -> their token ids in one array, end-of-text after each document.

    Also the number of documents that spell a special token, which stays text.
    """

    encoder: TextEncoder
    raw: str

    def __call__(self, lines: Lines) -> tuple[np.ndarray, int]:
        documents = []
        for number, line in lines:
            # as text files are read: a line ends with its newline, and a carriage return counts as one
            text = io.StringIO(decode(line, f"{self.raw}, line {number}"), newline=None)
            documents += [document.replace(NEWLINE_MARK, "\n") for document in text]
        rows, spelled = self.encoder.texts(documents)
        end = self.encoder.tokenizer.eos_token_id
        return np.array([token for row in rows for token in (*row, end)], dtype=np.int64), spelled


class Pieces:
    """The token ids that `EncodeDocuments` gives, one array after the other; counts tokens and what it counted."""

    def __init__(self, encoded: Iterable[tuple[np.ndarray, int]]) -> None:
        self.encoded, self.tokens, self.spelled = encoded, 0, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for ids, spelled in self.encoded:
            self.tokens += len(ids)
            self.spelled += spelled
            yield ids


def packed(pieces: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """The stream of tokens cut into rows of `length`; what does not fill the last row is left out."""
    rest = np.empty(0, dtype=np.int64)
    for piece in pieces:
        rest = np.concatenate([rest, piece])
        full = len(rest) // length * length
        yield from rest[:full].reshape(-1, length)
        rest = rest[full:]
