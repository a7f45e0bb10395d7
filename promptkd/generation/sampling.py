"""Choosing the next token: greedy or sampled, reproducibly for each example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from promptkd.utils.running_sums import running_sums

Noise = Callable[[int], np.ndarray]  # row -> uniform numbers in [0, 1), one for each new token


@dataclass(frozen=True)
class Sampling:
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    no_repeat_ngram_size: int = 0


@dataclass(frozen=True)
class TeacherMixture:
    """Draw from (1 - share) * the model's distribution + share * this one's. `model` is in eval mode."""

    model: PreTrainedModel
    share: float

    def __call__(self, logits: Tensor, other: Tensor) -> Tensor:
        """Log-probabilities of the mixture, float32, of two models' logits [rows, vocabulary]."""
        mine, theirs = logits.float().softmax(-1), other.float().softmax(-1)
        return torch.lerp(mine, theirs, self.share).log()


def uniform_draws(seed: int, *key: int, count: int) -> np.ndarray:
    """`count` uniform numbers that belong to (seed, *key), float64 in [0, 1): counter-based, no state."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *key]))).random(count)


def sample_token(logits: Tensor, sampling: Sampling, uniform: Tensor | None) -> Tensor:
    """The next token of each row: int64 [rows]. logits [rows, vocabulary]; uniform [rows] when sampling.

    The token at which the cumulative probability first exceeds the row's uniform number.
    """
    if not sampling.do_sample:
        return logits.argmax(-1)
    logits = logits.float()
    if sampling.temperature != 1.0:
        # The largest logit becomes 0 first: divided by a tiny temperature it would overflow.
        logits = logits - logits.max(-1, keepdim=True).values
        logits = logits / max(sampling.temperature, torch.finfo(logits.dtype).tiny)
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1.0:
        ranked, order = logits.sort(descending=True)
        before = running_sums(ranked.softmax(-1)) - ranked.softmax(-1)
        dropped = before >= sampling.top_p
        dropped[:, 0] = False  # the likeliest token stays, however small --top-p is
        logits = logits.masked_fill(dropped.gather(1, order.argsort(-1)), -torch.inf)
    return _inverse_cdf(logits.softmax(-1), uniform)


_SPAN = 256


def _inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first token of each row whose cumulative probability exceeds the row's number: int64 [rows].

    First the span of 256 tokens in which that happens, by the spans' sums, then the token within the span:
    running sums over the whole vocabulary would cost more than the softmax itself.
    """
    vocabulary = probabilities.size(-1)
    whole = vocabulary // _SPAN * _SPAN
    spans = probabilities[:, :whole].unflatten(1, (-1, _SPAN)).sum(-1)
    spans = running_sums(torch.cat([spans, probabilities[:, whole:].sum(-1, keepdim=True)], dim=1))
    aim = uniform[:, None] * spans[:, -1:]
    span = _searchsorted_above(spans, aim)
    aim = aim - spans.gather(1, (span - 1).clamp(min=0)).masked_fill(span == 0, 0)
    within = span * _SPAN + torch.arange(_SPAN, device=span.device)
    inside = probabilities.gather(1, within.clamp(max=vocabulary - 1)).masked_fill(within >= vocabulary, 0)
    return (span * _SPAN + _searchsorted_above(running_sums(inside), aim)).squeeze(1)


def _searchsorted_above(cumulative: Tensor, aim: Tensor) -> Tensor:
    """The first place whose cumulative sum exceeds the row's aim: [rows, 1].

    An aim that rounding has put at or above the total means the last place that adds anything.
    """
    first = torch.searchsorted(cumulative, aim, right=True)
    return torch.minimum(first, torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()))
