"""Decode responses to many prompts with several seeds, distributed over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from promptkd.data.batching import group_by_length
from promptkd.data.thoughts import answer_text
from promptkd.distributed.ranks import Ranks
from promptkd.generation.decode import GenerationRequest, decode
from promptkd.generation.sampling import Sampling


class Decoded(NamedTuple):
    """A response to a prompt with one of the seeds. `token_ids` excludes the token that ended it."""

    seed_index: int
    prompt_index: int
    token_ids: list[int]


def decode_share(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    token_budget: int,
    ranks: Ranks,
    progress: Callable[[int], None] | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    prefix: Tensor | None = None,
) -> Iterator[list[Decoded]]:
    """Decode this rank's share of all (seed, prompt) pairs and yield each batch when it is finished.

    A response depends only on model, prompt, seed and the prompt's index, except for rounding. It depends neither on
    the ranks nor on the token budget. A batch mixes seeds, because prompts of equal length make decoding fast.

    Args:
        model: The model, in eval mode.
        prompts: Token ids of each prompt.
        seeds: Every prompt is answered once with each seed.
        end_ids: Tokens that end a response.
        max_new_tokens: Maximum number of tokens in a response.
        sampling: How the next token is chosen.
        token_budget: See `decode`.
        ranks: The ranks that share the work.
        progress: Called with the number of responses of this rank that have just finished.
        pairs: The (seed index, prompt index) pairs of this rank. None for its share of all.
        prefix: Embeddings in front of every prompt, `(length, hidden)`.
    """
    if pairs is None:
        pairs = share(prompts, len(seeds), ranks)
    lengths = [len(prompts[prompt]) + max_new_tokens for _, prompt in pairs]
    for group in group_by_length(lengths, token_budget):
        batch = [pairs[i] for i in group]
        request = GenerationRequest(
            [prompts[prompt] for _, prompt in batch],
            max_new_tokens,
            end_ids,
            sampling,
            rng_keys=[(seeds[seed], prompt) for seed, prompt in batch],
            prefix=prefix,
        )
        output = decode(model, request, token_budget, progress=progress, broadcast=ranks.broadcast_tp)
        yield [Decoded(*pair, without_end(ids.tolist(), end_ids)) for pair, ids in zip(batch, output.responses)]


def gather_texts(
    batches: Iterable[list[Decoded]], tokenizer: Any, prompts: Sequence[np.ndarray], seeds: int, ranks: Ranks
) -> list[list[str]]:
    """Collect the texts of all ranks' responses (see `decode_share`) on every rank.

    Returns:
        The texts as `texts[seed_index][prompt_index]`, without the model's thoughts (see `promptkd.data.thoughts`).
    """
    own = [
        (each.seed_index, each.prompt_index, answer_text(tokenizer, each.token_ids, prompts[each.prompt_index])[0])
        for batch in batches
        for each in batch
    ]
    texts = [[""] * len(prompts) for _ in range(seeds)]
    for seed, prompt, text in ranks.all_gather_objects(own):
        texts[seed][prompt] = text
    return texts


def share(prompts: Sequence[np.ndarray], seeds: int, ranks: Ranks) -> list[tuple[int, int]]:
    """List the (seed index, prompt index) pairs of this rank, sorted by length and dealt to the ranks in turn."""
    pairs = [(seed, prompt) for prompt in range(len(prompts)) for seed in range(seeds)]
    return sorted(pairs, key=lambda pair: -len(prompts[pair[1]]))[ranks.dp_rank :: ranks.dp_size]


def without_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """Strip the token that ends a response, if there is one."""
    return ids[:-1] if ids and ids[-1] in end_ids else ids
