"""Decode responses for many prompts at once, on any causal LM of transformers.

Prompts are grouped by length within a token budget and padded on the left; rows that have ended leave the
batch and its key-value cache, so that a few long answers do not hold the rest. Sampling draws one uniform
number for each token and inverts the cumulative distribution: the same distribution as `generate`, without
noise over the vocabulary, and the number belongs to the example, so that the answer depends neither on the
batch, nor on the rank, nor on the order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from promptkd.data.windows import group_by_length
from promptkd.kv_cache import GrowingCache
from promptkd.repeats import RepeatGuard, ban

Noise = Callable[[int], np.ndarray]  # row -> uniform numbers in [0, 1), one for each new token


@dataclass(frozen=True)
class Sampling:
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    no_repeat_ngram_size: int = 0


@dataclass(frozen=True)
class Mix:
    """Draw from (1 - share) * the model's distribution + share * this one's. `model` is in eval mode."""

    model: PreTrainedModel
    share: float

    def __call__(self, logits: Tensor, other: Tensor) -> Tensor:
        """Log-probabilities of the mixture, float32, of two models' logits [rows, vocabulary]."""
        mine, theirs = logits.float().softmax(-1), other.float().softmax(-1)
        return torch.lerp(mine, theirs, self.share).log()


@dataclass
class Rollout:
    """responses: int64 [length] each, up to and including the token that ends it (or cut at the limit).

    states: the model's hidden states that predicted them, [length, width] each, if asked for.
    """

    responses: list[Tensor]
    states: list[Tensor] | None = None


def example_noise(seed: int, *key: int, count: int) -> np.ndarray:
    """`count` uniform numbers that belong to (seed, *key), float64 in [0, 1): counter-based, no state."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *key]))).random(count)


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    sampling: Sampling,
    noise: Noise | None,
    token_budget: int,
    keep_states: bool = False,
    mix: Mix | None = None,
    prefix: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> Rollout:
    """Decode a response of at most `max_new_tokens` for each prompt. `model` is in eval mode.

    A response ends with the first of `end_ids` (`promptkd.models.end_ids`).

    `mix` lets another model have a say in each token. `prefix`, embeddings [length, width], stands in front of every
    prompt (not together with `mix`: the models' positions would differ). `noise` is needed when sampling.
    `token_budget` bounds rows x (longest prompt + max_new_tokens) of a batch. `progress` is told how many rows have
    ended each time some do.
    `agree` makes the tokens those of one rank where several decode together (`Ranks.agree`).
    """
    rollout = Rollout([torch.empty(0, dtype=torch.long)] * len(prompts), [] if keep_states else None)
    if keep_states:
        rollout.states = [torch.empty(0)] * len(prompts)
    if mix is not None and prefix is not None:
        raise ValueError("mix and prefix exclude each other: the positions of the models would differ")
    longest = max_new_tokens + (0 if prefix is None else len(prefix))
    lengths = [len(prompt) + longest for prompt in prompts]
    models = [model] if mix is None else [model, mix.model]
    heads = [_decoding_head(each) for each in models]
    for rows in group_by_length(lengths, token_budget):
        batch = _Batch(
            models, heads, rows, prompts, max_new_tokens, end_ids, sampling, noise, rollout, mix, prefix, agree
        )
        while batch.rows:
            ended = batch.step()
            if progress is not None and ended:
                progress(ended)
    return rollout


def _decoding_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """hidden [rows, width] -> logits. On a CPU from a transposed copy of the weight, kept while decoding lasts:
    for the few rows of a decoding step that is twice as fast as the weight as it lies."""
    head = model.get_output_embeddings()
    if model.device.type != "cpu" or not isinstance(head, torch.nn.Linear):
        return head
    transposed = head.weight.t().contiguous()
    if head.bias is None:
        return lambda hidden: hidden @ transposed
    return lambda hidden: torch.addmm(head.bias, hidden, transposed)


@dataclass
class _Batch:
    """Rows that are decoded together. All tensors have one row for each sequence that has not ended."""

    models: list[PreTrainedModel]  # the second one is the mix's
    heads: list[Callable[[Tensor], Tensor]]
    rows: list[int]
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    end_ids: Sequence[int]
    sampling: Sampling
    noise: Noise | None
    rollout: Rollout
    mix: Mix | None
    prefix: Tensor | None
    agree: Callable[[Tensor], Tensor] | None

    def __post_init__(self) -> None:
        device, count = self.models[0].device, len(self.rows)
        self.caches = [GrowingCache(model.config) for model in self.models]
        prompts = [np.asarray(self.prompts[row], dtype=np.int64) for row in self.rows]
        ahead = 0 if self.prefix is None else len(self.prefix)
        self.width = ahead + max(map(len, prompts))
        ids = np.zeros((count, self.width), dtype=np.int64)
        mask = np.zeros((count, self.width + self.max_new_tokens), dtype=np.int64)
        for place, prompt in enumerate(prompts):
            ids[place, self.width - len(prompt) :] = prompt
            mask[place, self.width - len(prompt) - ahead :] = 1
        self.inputs = {"input_ids": torch.from_numpy(ids).to(device)}
        if self.prefix is not None:
            embedded = self.models[0].get_input_embeddings()(self.inputs["input_ids"])
            for row, prompt in zip(embedded, prompts):
                row[self.width - len(prompt) - ahead : self.width - len(prompt)] = self.prefix
            self.inputs = {"inputs_embeds": embedded}
        self.mask = torch.from_numpy(mask).to(device)
        self.positions = (self.mask[:, : self.width].cumsum(-1) - 1).clamp(min=0)
        self.made = torch.zeros(count, self.max_new_tokens, dtype=torch.long, device=device)
        self.ends = torch.tensor(list(self.end_ids), device=device)
        self.uniform = self._uniform(device)
        self.repeats = None
        if self.sampling.no_repeat_ngram_size:
            self.repeats = [RepeatGuard(self.sampling.no_repeat_ngram_size, p.tolist()) for p in prompts]
        self.states: Tensor | None = None
        self.length = 0

    def _uniform(self, device: torch.device) -> Tensor | None:
        if not self.sampling.do_sample:
            return None
        numbers = np.stack([self.noise(row)[: self.max_new_tokens] for row in self.rows])
        return torch.from_numpy(numbers).float().to(device)

    def step(self) -> int:
        """Decode one token for each row; return how many rows ended with it."""
        hidden, *others = [self._states(model, cache) for model, cache in zip(self.models, self.caches)]
        logits = self.heads[0](hidden)
        if self.mix is not None:
            logits = self.mix(logits, self.heads[1](others[0]))
        if self.repeats is not None:
            ban(logits, [guard.banned() for guard in self.repeats])
        uniform = None if self.uniform is None else self.uniform[:, self.length]
        tokens = choose(logits, self.sampling, uniform)
        if self.agree is not None:
            tokens = self.agree(tokens)
        self._keep(tokens, hidden)
        ended = torch.isin(tokens, self.ends) | (self.length == self.max_new_tokens)
        count = int(ended.sum())
        if count:
            self._leave(ended)
        self.inputs = {"input_ids": self.made[:, self.length - 1 : self.length]}
        self.positions = self.positions[:, -1:] + 1
        return count

    def _states(self, model: PreTrainedModel, cache: GrowingCache) -> Tensor:
        return model.base_model(
            **self.inputs,
            attention_mask=self.mask[:, : self.width + self.length],
            position_ids=self.positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

    def _keep(self, tokens: Tensor, hidden: Tensor) -> None:
        if self.rollout.states is not None:
            if self.states is None:
                self.states = hidden.new_zeros(len(self.rows), self.max_new_tokens, hidden.size(1))
            self.states[:, self.length] = hidden
        self.made[:, self.length] = tokens
        self.length += 1
        self.mask[:, self.width + self.length - 1] = 1
        if self.repeats is not None:
            for guard, token in zip(self.repeats, tokens.tolist()):
                guard.add(token)

    def _leave(self, ended: Tensor) -> None:
        """Write down the rows that ended and drop them from the batch."""
        for place in ended.nonzero().flatten().tolist():
            self.rollout.responses[self.rows[place]] = self.made[place, : self.length].cpu()
            if self.states is not None:
                self.rollout.states[self.rows[place]] = self.states[place, : self.length].clone()
        keep = (~ended).nonzero().flatten()
        stays = keep.tolist()
        self.rows = [self.rows[place] for place in stays]
        if not stays:
            return
        for cache in self.caches:
            cache.batch_select_indices(keep)
        self.made, self.mask, self.positions = self.made[keep], self.mask[keep], self.positions[keep]
        self.uniform = None if self.uniform is None else self.uniform[keep]
        self.states = None if self.states is None else self.states[keep]
        self.repeats = self.repeats and [self.repeats[place] for place in stays]


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor | None) -> Tensor:
    """The next token of each row: int64 [rows]. logits [rows, vocabulary]; uniform [rows] when sampling.

    The token at which the cumulative probability first exceeds the row's uniform number.
    """
    if not sampling.do_sample:
        return logits.argmax(-1)
    logits = logits.float()
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1.0:
        ranked, order = logits.sort(descending=True)
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        logits = logits.masked_fill((before >= sampling.top_p).gather(1, order.argsort(-1)), -torch.inf)
    return _invert(logits.softmax(-1), uniform)


_SPAN = 256


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first token of each row whose cumulative probability exceeds the row's number: int64 [rows].

    First the span of 256 tokens in which that happens, by the spans' sums, then the token within the span:
    running sums over the whole vocabulary would cost more than the softmax itself.
    """
    vocabulary = probabilities.size(-1)
    whole = vocabulary // _SPAN * _SPAN
    spans = probabilities[:, :whole].unflatten(1, (-1, _SPAN)).sum(-1)
    spans = torch.cat([spans, probabilities[:, whole:].sum(-1, keepdim=True)], dim=1).cumsum_(-1)
    aim = uniform[:, None] * spans[:, -1:]
    span = _first_above(spans, aim)
    aim = aim - spans.gather(1, (span - 1).clamp(min=0)).masked_fill(span == 0, 0)
    within = span * _SPAN + torch.arange(_SPAN, device=span.device)
    inside = probabilities.gather(1, within.clamp(max=vocabulary - 1)).masked_fill(within >= vocabulary, 0)
    return (span * _SPAN + _first_above(inside.cumsum_(-1), aim)).squeeze(1)


def _first_above(cumulative: Tensor, aim: Tensor) -> Tensor:
    """The first place whose cumulative sum exceeds the row's aim: [rows, 1].

    An aim that rounding has put at or above the total means the last place that adds anything.
    """
    first = torch.searchsorted(cumulative, aim, right=True)
    return torch.minimum(first, torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()))
