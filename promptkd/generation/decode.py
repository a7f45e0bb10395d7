"""Decode responses to many prompts at once with any causal language model of transformers.

Prompts are grouped by length within a token budget and padded on the left. Finished sequences leave the batch and its
key-value cache, so that a few long responses do not hold up the memory of the others.

Sampling draws one uniform number per token and inverts the cumulative distribution. Tokens have the distribution that
`generate` gives them. The numbers belong to the example, so a response does not depend on batch, rank or order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from promptkd.data.batching import group_by_length
from promptkd.generation.kv_cache import GrowingCache, takes_padding
from promptkd.generation.sampling import (
    NoRepeatNgram,
    Sampling,
    TeacherMixture,
    mask_banned,
    sample_token,
    uniform_draws,
)
from promptkd.models.vocabulary import SharedVocabulary


@dataclass(frozen=True)
class GenerationRequest:
    """Prompts to respond to, and how.

    Attributes:
        prompts: Token ids of each prompt.
        max_new_tokens: Maximum number of tokens in a response.
        end_ids: Tokens that end a response (see `promptkd.models.loading.end_ids`).
        sampling: How the next token is chosen.
        rng_keys: For each prompt, the seed and further integers that its random numbers belong to. Only for sampling.
        teacher_mixture: A second model that contributes to the distribution of each token.
        prefix: Embeddings in front of every prompt, `(length, hidden)`. Excludes `teacher_mixture`.
        shared: Restricts the distributions to these token ids, renormalized.
        keep_states: Whether to return the hidden states that predict the responses.
    """

    prompts: Sequence[Sequence[int]] | Sequence[np.ndarray]
    max_new_tokens: int
    end_ids: Sequence[int]
    sampling: Sampling
    rng_keys: Sequence[tuple[int, ...]] = ()
    teacher_mixture: TeacherMixture | None = None
    prefix: Tensor | None = None
    shared: SharedVocabulary | None = None
    keep_states: bool = False

    def __post_init__(self) -> None:
        if self.teacher_mixture is not None and self.prefix is not None:
            raise ValueError("teacher_mixture and prefix exclude each other: the models' positions would differ")


@dataclass
class GenerationOutput:
    """Responses in the order of the prompts.

    Attributes:
        responses: Token ids on the CPU, int64 `(length,)`. The last one is an end token unless the limit was reached.
        hidden_states: The states that predicted the tokens, `(length, hidden)`. Empty unless they were requested.
    """

    responses: list[Tensor]
    hidden_states: list[Tensor]


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    request: GenerationRequest,
    token_budget: int,
    *,
    progress: Callable[[int], None] | None = None,
    broadcast: Callable[[Tensor], Tensor] | None = None,
) -> GenerationOutput:
    """Decode a response to each prompt.

    Args:
        model: The model, in eval mode with complete weights.
        request: The prompts, and how to respond to them.
        token_budget: Maximum of sequences x (longest prompt + `max_new_tokens`) in a batch. A batch has at least one.
        progress: Called with the number of sequences that have just finished.
        broadcast: Replaces tokens by those of one rank, where several ranks decode together (`Ranks.broadcast_tp`).
    """
    count = len(request.prompts)
    output = GenerationOutput([torch.empty(0, dtype=torch.long)] * count, [])
    if request.keep_states:
        output.hidden_states = [torch.empty(0)] * count
    models = [model]
    if request.teacher_mixture is not None:
        models.append(request.teacher_mixture.model)
    heads = [_decoding_head(each) for each in models]
    prefix_length = 0 if request.prefix is None else len(request.prefix)
    lengths = [prefix_length + len(prompt) + request.max_new_tokens for prompt in request.prompts]
    for indices in _batches(lengths, token_budget, padded=all(map(takes_padding, models))):
        batch = _Batch([_CachedModel(*each) for each in zip(models, heads)], request, indices, output, broadcast)
        while batch.active:
            finished = batch.step()
            if progress is not None and finished:
                progress(finished)
    return output


def _batches(lengths: list[int], token_budget: int, padded: bool) -> list[list[int]]:
    """Group sequences to decode together. Without padding, only sequences of one length form a batch."""
    groups = group_by_length(lengths, token_budget)
    if padded:
        return groups
    return [list(batch) for group in groups for _, batch in itertools.groupby(group, key=lengths.__getitem__)]


def _decoding_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return the function from hidden states `(batch, hidden)` to logits.

    On a CPU it multiplies by a transposed copy of the weight. For the few sequences of a decoding step, that is twice
    as fast as the weight itself.
    """
    head = model.get_output_embeddings()
    if model.device.type != "cpu" or not isinstance(head, torch.nn.Linear):
        return head
    transposed = head.weight.t().contiguous()
    if head.bias is None:
        return lambda hidden: hidden @ transposed
    return lambda hidden: torch.addmm(head.bias, hidden, transposed)


class _CachedModel:
    """A model with its output head and the key-value cache of one batch."""

    def __init__(self, model: PreTrainedModel, head: Callable[[Tensor], Tensor]) -> None:
        self.model, self.head = model, head
        self.cache = GrowingCache(model.config)

    def hidden_states(self, inputs: dict[str, Tensor], attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Read the inputs and return the hidden states at the last position, `(batch, hidden)`."""
        return self.model.base_model(
            **inputs,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]


class _Batch:
    """Sequences that are decoded together. All tensors hold only the active ones, those that have not finished."""

    def __init__(
        self,
        models: list[_CachedModel],
        request: GenerationRequest,
        indices: list[int],
        output: GenerationOutput,
        broadcast: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.models, self.request, self.output, self.broadcast = models, request, output, broadcast
        self.active = indices  # indices of the prompts
        self.device = models[0].model.device
        self.length = 0  # generated tokens of each active sequence
        self._pad_prompts()
        new_tokens, sampling = request.max_new_tokens, request.sampling
        self.generated = torch.zeros(len(indices), new_tokens, dtype=torch.long, device=self.device)
        self.end_ids = torch.tensor(list(request.end_ids), device=self.device)
        self.states: Tensor | None = None
        self.uniform: Tensor | None = None
        if sampling.do_sample:
            draws = np.stack([uniform_draws(*request.rng_keys[i], count=new_tokens) for i in indices])
            self.uniform = torch.from_numpy(draws).float().to(self.device)
        self.ngrams: list[NoRepeatNgram] = []
        if size := sampling.no_repeat_ngram_size:
            self.ngrams = [NoRepeatNgram(size, list(map(int, request.prompts[i]))) for i in indices]

    def _pad_prompts(self) -> None:
        """Set the first inputs: prompts padded on the left, behind the prefix if there is one."""
        prompts = [np.asarray(self.request.prompts[i], dtype=np.int64) for i in self.active]
        prefix = self.request.prefix
        prefix_length = 0 if prefix is None else len(prefix)
        self.prompt_width = prefix_length + max(map(len, prompts))
        input_ids = np.zeros((len(prompts), self.prompt_width), dtype=np.int64)
        attention_mask = np.ones((len(prompts), self.prompt_width + self.request.max_new_tokens), dtype=np.int64)
        starts = [self.prompt_width - len(prompt) for prompt in prompts]
        for row, (prompt, start) in enumerate(zip(prompts, starts)):
            input_ids[row, start:] = prompt
            attention_mask[row, : start - prefix_length] = 0
        self.inputs = {"input_ids": torch.from_numpy(input_ids).to(self.device)}
        if prefix is not None:
            embeddings = self.models[0].model.get_input_embeddings()(self.inputs["input_ids"])
            for row, start in enumerate(starts):
                embeddings[row, start - prefix_length : start] = prefix
            self.inputs = {"inputs_embeds": embeddings}
        self.attention_mask = torch.from_numpy(attention_mask).to(self.device)
        self.position_ids = (self.attention_mask[:, : self.prompt_width].cumsum(-1) - 1).clamp(min=0)

    def step(self) -> int:
        """Decode one token of each active sequence and return how many sequences finished."""
        mask = self.attention_mask[:, : self.prompt_width + self.length]
        hidden = [model.hidden_states(self.inputs, mask, self.position_ids) for model in self.models]
        tokens = self._next_tokens(hidden)
        self._append(tokens, hidden[0])
        finished = torch.isin(tokens, self.end_ids) | (self.length == self.request.max_new_tokens)
        count = int(finished.sum())
        if count:
            self._evict_finished(finished)
        self.inputs = {"input_ids": self.generated[:, self.length - 1 : self.length]}
        self.position_ids = self.position_ids[:, -1:] + 1
        return count

    def _next_tokens(self, hidden: list[Tensor]) -> Tensor:
        """Choose the next token of each sequence from the hidden states of all models."""
        logits = [model.head(states) for model, states in zip(self.models, hidden)]
        if self.request.shared is not None:
            logits = [self.request.shared.restrict(each) for each in logits]
        mixture = self.request.teacher_mixture
        scores = logits[0] if mixture is None else mixture(*logits)
        mask_banned(scores, self.ngrams)
        uniform = None if self.uniform is None else self.uniform[:, self.length]
        tokens = sample_token(scores, self.request.sampling, uniform)
        return tokens if self.broadcast is None else self.broadcast(tokens)

    def _append(self, tokens: Tensor, hidden: Tensor) -> None:
        if self.request.keep_states:
            if self.states is None:
                self.states = hidden.new_zeros(len(tokens), self.request.max_new_tokens, hidden.size(1))
            self.states[:, self.length] = hidden
        self.generated[:, self.length] = tokens
        self.length += 1
        if self.ngrams:
            for ngrams, token in zip(self.ngrams, tokens.tolist()):
                ngrams.add(token)

    def _evict_finished(self, finished: Tensor) -> None:
        """Move finished sequences to the output and drop them from the batch."""
        for row in finished.nonzero().flatten().tolist():
            self.output.responses[self.active[row]] = self.generated[row, : self.length].cpu()
            if self.states is not None:
                self.output.hidden_states[self.active[row]] = self.states[row, : self.length].clone()
        kept = (~finished).nonzero().flatten()
        rows = kept.tolist()
        self.active = [self.active[row] for row in rows]
        if not rows:
            return
        for model in self.models:
            model.cache.batch_select_indices(kept)
        self.generated, self.attention_mask = self.generated[kept], self.attention_mask[kept]
        self.position_ids = self.position_ids[kept]
        self.uniform = None if self.uniform is None else self.uniform[kept]
        self.states = None if self.states is None else self.states[kept]
        self.ngrams = [self.ngrams[row] for row in rows] if self.ngrams else []
