"""Sampled answers to many prompts with several seeds, shared out over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from transformers import PreTrainedModel

from promptkd.data.batching import group_by_length
from promptkd.data.thoughts import answer_text
from promptkd.distributed.ranks import Ranks
from promptkd.generation.decode import decode
from promptkd.generation.sampling import Sampling, uniform_draws

Decoded = tuple[int, int, list[int]]  # place of the seed, place of the prompt, token ids without what ends them


def answer(
    model: PreTrainedModel,
    tokenizer,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    sampling: Sampling,
    token_budget: int,
    ranks: Ranks,
    progress: Callable[[int], None] | None = None,
) -> list[list[str]]:
    """The answers, seed by seed and prompt by prompt: `answers[seed place][prompt place]`, the same on all ranks.

    `model` is in eval mode. An answer depends on model, prompt, seed and the prompt's place alone, not on the
    ranks or the token budget (but for rounding). `progress` hears how many answers of this rank were finished.
    """
    batches = decode_share(
        model, prompts, seeds, end_ids=end_ids, max_new_tokens=max_new_tokens,
        sampling=sampling, token_budget=token_budget, ranks=ranks, progress=progress,
    )  # fmt: skip
    mine = [
        (seed, prompt, text_of(tokenizer, ids, prompts[prompt])) for batch in batches for seed, prompt, ids in batch
    ]
    answers = [[""] * len(prompts) for _ in seeds]
    for seed, prompt, text in ranks.all_gather_objects(mine):
        answers[seed][prompt] = text
    return answers


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
) -> Iterator[list[Decoded]]:
    """Decode this rank's share of all (seed, prompt) pairs and hand out each batch when it is finished.

    Batches mix the seeds: what counts for speed is that their prompts are equally long.
    """
    pairs = share(prompts, len(seeds), ranks)
    lengths = [len(prompts[prompt]) + max_new_tokens for _, prompt in pairs]
    for group in group_by_length(lengths, token_budget):
        batch = [pairs[place] for place in group]
        rollout = decode(
            model,
            [prompts[prompt] for _, prompt in batch],
            max_new_tokens=max_new_tokens,
            end_ids=end_ids,
            sampling=sampling,
            noise=lambda row, b=batch: uniform_draws(seeds[b[row][0]], b[row][1], count=max_new_tokens),
            token_budget=token_budget,
            progress=progress,
            agree=ranks.broadcast_tp,
        )
        yield [(*pair, without_end(ids.tolist(), end_ids)) for pair, ids in zip(batch, rollout.responses)]


def share(prompts: Sequence[np.ndarray], seeds: int, ranks: Ranks) -> list[tuple[int, int]]:
    """The (seed place, prompt place) pairs of this rank: sorted by length, then dealt in turn, so all have alike."""
    pairs = [(seed, prompt) for prompt in range(len(prompts)) for seed in range(seeds)]
    return sorted(pairs, key=lambda pair: -len(prompts[pair[1]]))[ranks.dp_rank :: ranks.dp_size]


def without_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """A response without the token that ends it, if it was not cut before."""
    return ids[:-1] if ids and ids[-1] in end_ids else ids


def text_of(tokenizer, ids: list[int], prompt: Sequence[int] = ()) -> str:
    """The text of an answer, without what the model thought before it (see promptkd.data.thoughts)."""
    return answer_text(tokenizer, ids, prompt)[0]
