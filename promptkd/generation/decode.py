"""Decode responses to many prompts at once with any causal language model of transformers.

Prompts are grouped by length within a token budget and padded on the left. Finished sequences leave the batch and its
key-value cache, so that a few long responses do not hold up the memory of the others. On a GPU, the decoding step is
captured in a CUDA graph (see `promptkd.generation.captured`).

Sampling draws one uniform number per token and inverts the cumulative distribution. Tokens have the distribution that
`generate` gives them. The numbers belong to the example, so a response does not depend on batch, rank or order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from promptkd.data.batching import group_by_length
from promptkd.generation.batch import Batch
from promptkd.generation.cached_model import decoding_head
from promptkd.generation.kv_cache import takes_padding
from promptkd.generation.request import GenerationOutput, GenerationRequest

__all__ = ["GenerationOutput", "GenerationRequest", "decode"]


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
    heads = [decoding_head(each) for each in models]
    prefix_length = 0 if request.prefix is None else len(request.prefix)
    lengths = [prefix_length + len(prompt) + request.max_new_tokens for prompt in request.prompts]
    for indices in _batches(lengths, token_budget, padded=all(map(takes_padding, models))):
        batch = Batch(list(zip(models, heads)), request, indices, output, broadcast)
        while batch.is_active:
            finished = batch.advance()
            if progress is not None and finished:
                progress(finished)
    return output


def _batches(lengths: list[int], token_budget: int, padded: bool) -> list[list[int]]:
    """Group sequences to decode together. Without padding, only sequences of one length form a batch."""
    groups = group_by_length(lengths, token_budget)
    if padded:
        return groups
    return [list(batch) for group in groups for _, batch in itertools.groupby(group, key=lengths.__getitem__)]
