"""Choose the next token: greedy or sampled, reproducibly for each example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from promptkd.utils.running_sums import running_sums


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


def mask_repeated_ngrams(scores: Tensor, tokens: Tensor, end: Tensor, size: int) -> None:
    """Set the scores of tokens that would repeat an n-gram of their sequence to minus infinity, in place.

    Args:
        scores: Logits or log-probabilities, `(batch, vocab)`.
        tokens: Token ids `(batch, seq)`, -1 where there is none: before the first token and after the last.
        end: The number of positions up to the last token, int64 `(1,)`. It is at least `size` - 1.
        size: The length of the n-grams.
    """
    last = tokens.index_select(1, end - torch.arange(size - 1, 0, -1, device=end.device))
    ngrams = tokens.unfold(1, size, 1)
    next_tokens = ngrams[..., -1]
    # A prompt may hold tokens outside of a restricted vocabulary. Those cannot be sampled anyway.
    banned = (ngrams[..., :-1] == last[:, None]).all(-1) & (next_tokens >= 0) & (next_tokens < scores.size(-1))
    limits = scores.new_full(next_tokens.shape, torch.inf).masked_fill_(banned, -torch.inf)
    scores.scatter_reduce_(1, next_tokens.clamp(0, scores.size(-1) - 1), limits, "amin")


def uniform_draws(seed: int, *key: int, count: int) -> np.ndarray:
    """Return `count` uniform float64 numbers in [0, 1) that depend only on (seed, *key)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *key]))).random(count)


def uniform_rows(rng_keys: Sequence[tuple[int, ...]], count: int) -> Tensor:
    """Return `count` uniform float32 numbers in [0, 1) for each of the keys, `(keys, count)`."""
    draws = np.stack([uniform_draws(*key, count=count) for key in rng_keys])
    return torch.from_numpy(np.minimum(draws.astype(np.float32), np.float32(1 - 2**-24)))  # rounding may give 1


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
    if sampling.temperature != 1.0:
        logits = logits.float()
        # The largest logit becomes 0 first. Divided by a tiny temperature, it would overflow.
        logits = logits - logits.max(-1, keepdim=True).values
        logits = logits / max(sampling.temperature, torch.finfo(logits.dtype).tiny)
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1.0:
        ranked, order = logits.float().sort(descending=True)
        probability_before = running_sums(ranked.softmax(-1)) - ranked.softmax(-1)
        dropped = probability_before >= sampling.top_p
        dropped[:, 0] = False  # The most likely token stays, however small top_p is.
        logits = logits.masked_fill(dropped.gather(1, order.argsort(-1)), -torch.inf)
    return _inverse_cdf(logits.softmax(-1, dtype=torch.float32), uniform)


_SPAN = 256


def _inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return the first token whose cumulative probability exceeds the sequence's number, int64 `(batch,)`.

    The sums of spans of 256 tokens tell the span, and running sums within the span tell the token. Running sums over
    the complete vocabulary would cost more than the softmax itself. On a GPU, launches cost more than sums. There,
    float64 sums are exact enough that a token of probability 0 adds nothing to them.
    """
    if probabilities.is_cuda and not torch.are_deterministic_algorithms_enabled():
        sums = probabilities.double().cumsum_(-1)
        return torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True).squeeze(1)
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


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Return the first index whose cumulative sum exceeds the sequence's target, `(batch, 1)`.

    If rounding has put the target at or above the total, this is the last index that adds anything.
    """
    first = torch.searchsorted(cumulative, target, right=True)
    return torch.minimum(first, torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()))
