"""Choose the next token: greedy or sampled, reproducibly for each example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, in the terms of `transformers.GenerationConfig`. A `top_k` of 0 means no limit."""

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    no_repeat_ngram_size: int = 0


@dataclass(frozen=True)
class TeacherMixture:
    """Sample from (1 - alpha) * the model's distribution + alpha * the teacher's. `model` is in eval mode."""

    model: PreTrainedModel
    alpha: float

    def __call__(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return the float32 log-probabilities of the mixture. All shapes are `(batch, vocab)`."""
        return torch.lerp(logits.float().softmax(-1), teacher_logits.float().softmax(-1), self.alpha).log()


class NoRepeatNgram:
    """The tokens that would repeat an n-gram of one sequence, known without searching the sequence again."""

    def __init__(self, size: int, tokens: Sequence[int]) -> None:
        self.size = size
        self.tokens: list[int] = []
        self.followers: dict[tuple[int, ...], list[int]] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Append a token to the sequence."""
        if len(self.tokens) >= self.size - 1:
            self.followers.setdefault(self._last(), []).append(token)
        self.tokens.append(token)

    def banned(self) -> list[int]:
        """Return the tokens that would complete an n-gram that the sequence has already."""
        return self.followers.get(self._last(), [])

    def _last(self) -> tuple[int, ...]:
        return tuple(self.tokens[len(self.tokens) - self.size + 1 :])


def mask_banned(logits: Tensor, ngrams: Sequence[NoRepeatNgram]) -> None:
    """Set the logits `(batch, vocab)` of each sequence's banned tokens to minus infinity, in place."""
    for row, each in enumerate(ngrams):
        # A prompt may hold tokens outside of a restricted vocabulary. Those cannot be sampled anyway.
        if tokens := [token for token in each.banned() if token < logits.size(-1)]:
            logits[row, tokens] = -torch.inf


def uniform_draws(seed: int, *key: int, count: int) -> np.ndarray:
    """Return `count` uniform float64 numbers in [0, 1) that depend only on (seed, *key)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *key]))).random(count)


def sample_token(logits: Tensor, sampling: Sampling, uniform: Tensor | None) -> Tensor:
    """Choose the next token of each sequence.

    Args:
        logits: Logits or log-probabilities, `(batch, vocab)`.
        sampling: How a token is chosen.
        uniform: A uniform number per sequence, `(batch,)`. Needed only for sampling.

    Returns:
        Token ids, int64 `(batch,)`. When sampling, the first token whose cumulative probability exceeds the number.
    """
    if not sampling.do_sample:
        return logits.argmax(-1)
    if uniform is None:
        raise ValueError("sampling needs a uniform number per sequence")
    logits = logits.float()
    if sampling.temperature != 1.0:
        # The largest logit becomes 0 first. Divided by a tiny temperature, it would overflow.
        logits = logits - logits.max(-1, keepdim=True).values
        logits = logits / max(sampling.temperature, torch.finfo(logits.dtype).tiny)
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1.0:
        ranked, order = logits.sort(descending=True)
        probability_before = running_sums(ranked.softmax(-1)) - ranked.softmax(-1)
        dropped = probability_before >= sampling.top_p
        dropped[:, 0] = False  # The most likely token stays, however small top_p is.
        logits = logits.masked_fill(dropped.gather(1, order.argsort(-1)), -torch.inf)
    return _inverse_cdf(logits.softmax(-1), uniform)


_SPAN = 256


def _inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return the first token whose cumulative probability exceeds the sequence's number, int64 `(batch,)`.

    The sums of spans of 256 tokens tell the span, and running sums within the span tell the token. Running sums over
    the complete vocabulary would cost more than the softmax itself.
    """
    vocab_size = probabilities.size(-1)
    full = vocab_size // _SPAN * _SPAN
    spans = probabilities[:, :full].unflatten(1, (-1, _SPAN)).sum(-1)
    spans = running_sums(torch.cat([spans, probabilities[:, full:].sum(-1, keepdim=True)], dim=1))
    target = uniform[:, None] * spans[:, -1:]
    span = _first_above(spans, target)
    target = target - spans.gather(1, (span - 1).clamp(min=0)).masked_fill(span == 0, 0)
    tokens = span * _SPAN + torch.arange(_SPAN, device=span.device)
    inside = probabilities.gather(1, tokens.clamp(max=vocab_size - 1)).masked_fill(tokens >= vocab_size, 0)
    return (span * _SPAN + _first_above(running_sums(inside), target)).squeeze(1)


def running_sums(values: Tensor) -> Tensor:
    """Compute the cumsum of nonnegative floats along the last dimension, possibly in place.

    CUDA has no deterministic cumsum of floats. With --deterministic, sums over 2, 4, 8... neighbors are added instead.
    Their rounding differs between neighbors, so `cummax` keeps the sums in order.
    """
    if not (values.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return values.cumsum_(-1)
    distance = 1
    while distance < values.size(-1):
        values = values + torch.nn.functional.pad(values[..., :-distance], (distance, 0))
        distance *= 2
    return values.cummax(-1).values


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Return the first index whose cumulative sum exceeds the sequence's target, `(batch, 1)`.

    If rounding has put the target at or above the total, this is the last index that adds anything.
    """
    first = torch.searchsorted(cumulative, target, right=True)
    return torch.minimum(first, torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()))
