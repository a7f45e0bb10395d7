"""No n-gram twice: the rule `no_repeat_ngram_size` of the published evaluation, without searching for repeats."""

from __future__ import annotations

import torch
from torch import Tensor


class NoRepeatNgram:
    """Tokens that would complete an n-gram the sequence already holds, known without searching it again."""

    def __init__(self, size: int, tokens: list[int]) -> None:
        self.size, self.tokens = size, []
        self.followers: dict[tuple[int, ...], list[int]] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        if len(self.tokens) >= self.size - 1:
            start = tuple(self.tokens[len(self.tokens) - self.size + 1 :])
            self.followers.setdefault(start, []).append(token)
        self.tokens.append(token)

    def banned(self) -> list[int]:
        if len(self.tokens) < self.size - 1:
            return []
        return self.followers.get(tuple(self.tokens[len(self.tokens) - self.size + 1 :]), [])


def ban(logits: Tensor, banned: list[list[int]]) -> None:
    """Set the logits [rows, vocabulary] of each row's banned tokens to minus infinity, in place.

    A prompt may hold tokens outside of a restricted vocabulary; those are impossible as it is.
    """
    for row, tokens in enumerate(banned):
        inside = [token for token in tokens if token < logits.size(-1)]
        if inside:
            logits[row, inside] = -torch.inf
