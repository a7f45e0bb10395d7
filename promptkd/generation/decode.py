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

from promptkd.data.batching import group_by_length
from promptkd.generation.kv_cache import GrowingCache, takes_padding
from promptkd.generation.ngrams import NoRepeatNgram, ban
from promptkd.generation.sampling import Noise, Sampling, TeacherMixture, sample_token
from promptkd.models.vocabulary import SharedVocabulary


@dataclass
class Rollout:
    """responses: int64 [length] each, up to and including the token that ends it (or cut at the limit).

    states: the model's hidden states that predicted them, [length, width] each, if asked for.
    """

    responses: list[Tensor]
    states: list[Tensor] | None = None


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
    mix: TeacherMixture | None = None,
    prefix: Tensor | None = None,
    shared: SharedVocabulary | None = None,
    progress: Callable[[int], None] | None = None,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> Rollout:
    """Decode a response of at most `max_new_tokens` for each prompt. `model` is in eval mode.

    A response ends with the first of `end_ids` (`promptkd.models.loading.end_ids`).

    `mix` lets another model have a say in each token. `prefix`, embeddings [length, width], stands in front of every
    prompt (not together with `mix`: the models' positions would differ). `noise` is needed when sampling.
    `shared` leaves only the ids that student and teacher share, renormalized, in both models' distributions.
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
    for rows in _batches(lengths, token_budget, all(map(takes_padding, models))):
        batch = _Batch(
            models, heads, rows, prompts, max_new_tokens, end_ids, sampling, noise, rollout, mix, prefix, shared, agree
        )
        while batch.rows:
            ended = batch.step()
            if progress is not None and ended:
                progress(ended)
    return rollout


def _batches(lengths: list[int], token_budget: int, padded: bool) -> list[list[int]]:
    """Rows that are decoded together; without padding, rows of one length only."""
    if padded:
        return group_by_length(lengths, token_budget)
    alike: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        alike.setdefault(length, []).append(row)
    return [
        [rows[place] for place in group]
        for length, rows in alike.items()
        for group in group_by_length([length] * len(rows), token_budget)
    ]


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
    mix: TeacherMixture | None
    prefix: Tensor | None
    shared: SharedVocabulary | None
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
            self.repeats = [NoRepeatNgram(self.sampling.no_repeat_ngram_size, p.tolist()) for p in prompts]
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
        logits = self._logits(0, hidden)
        if self.mix is not None:
            logits = self.mix(logits, self._logits(1, others[0]))
        if self.repeats is not None:
            ban(logits, [guard.banned() for guard in self.repeats])
        uniform = None if self.uniform is None else self.uniform[:, self.length]
        tokens = sample_token(logits, self.sampling, uniform)
        if self.agree is not None:
            tokens = self.agree(tokens)
        self._append(tokens, hidden)
        ended = torch.isin(tokens, self.ends) | (self.length == self.max_new_tokens)
        count = int(ended.sum())
        if count:
            self._evict_finished(ended)
        self.inputs = {"input_ids": self.made[:, self.length - 1 : self.length]}
        self.positions = self.positions[:, -1:] + 1
        return count

    def _logits(self, place: int, hidden: Tensor) -> Tensor:
        logits = self.heads[place](hidden)
        return logits if self.shared is None else self.shared.restrict(logits)

    def _states(self, model: PreTrainedModel, cache: GrowingCache) -> Tensor:
        return model.base_model(
            **self.inputs,
            attention_mask=self.mask[:, : self.width + self.length],
            position_ids=self.positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

    def _append(self, tokens: Tensor, hidden: Tensor) -> None:
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

    def _evict_finished(self, ended: Tensor) -> None:
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
