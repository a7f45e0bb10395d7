"""Micro-batches: sequences of prompt and response, grouped by length and padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from promptkd.utils.transfer import to_device

TokenIds = Sequence[int] | np.ndarray[Any, Any] | Tensor

# Time of starting a group's operators in a forward and backward pass, in tokens that could be computed meanwhile. On an
# H200, a further micro-batch of GPT-2 base <- XL took 60 - 80 ms besides 35 us for each token.
GROUP_COST = {"cpu": 64, "cuda": 2048}


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of prompt and response, padded on the right to the longest.

    The last token of a response is predicted but never read, so `ids` does not contain it.

    Attributes:
        members: The positions in the step's batch, in the order of the sequences.
        ids: int64, `(batch, seq)`.
        where: int64, `(response tokens,)`: the positions in the flattened `ids` whose states predict them.
        targets: int64, `(response tokens,)`.
        token_weights: float32, `(response tokens,)`: the weight of each token's loss in the step's loss.
        source: Which responses these are, for a method that uses several kinds in one step.
    """

    members: list[int]
    ids: Tensor
    where: Tensor
    targets: Tensor
    token_weights: Tensor
    source: str = ""


def make_micro_batches(
    prompts: Sequence[TokenIds],
    responses: Sequence[TokenIds],
    weights: Sequence[float],
    token_budget: int,
    device: torch.device,
    batches: int = 0,
) -> list[MicroBatch]:
    """Sort sequences by length and pad them in micro-batches of at most `token_budget` tokens.

    Args:
        prompts: The token ids of each prompt.
        responses: The token ids of each response.
        weights: The weight of each of a response's tokens, one for each sequence.
        token_budget: The maximum number of tokens with padding. A longer sequence gets its own micro-batch.
        device: Where the tensors are made.
        batches: The minimum number of micro-batches. All ranks have to run as many as the one that needs most.
            Larger groups are halved, then a sequence without weight is repeated.
    """
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses)]
    groups = group_with_little_padding(lengths, token_budget, device)
    while len(groups) < batches and max(map(len, groups)) > 1:
        largest = max(groups, key=len)
        groups.remove(largest)
        groups += [largest[::2], largest[1::2]]
    idle = batches - len(groups)
    micro_batches = [_collate(group, prompts, responses, weights, device) for group in groups]
    if idle > 0:
        shortest = [min(range(len(lengths)), key=lengths.__getitem__)]
        micro_batches += [_collate(shortest, prompts, responses, [0.0] * len(lengths), device)] * idle
    return micro_batches


def group_by_length(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Sort positions by length, longest first, in groups of at most `token_budget` tokens with padding."""
    groups: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= token_budget:
            groups[-1].append(position)
        else:
            groups.append([position])
    return groups


def group_with_little_padding(lengths: Sequence[int], token_budget: int, device: torch.device) -> list[list[int]]:
    """Sort positions by length, longest first, in groups that take the least time to compute.

    That is the time of their tokens, with padding, and of starting each group. Among all ways to cut the sorted
    positions, dynamic programming finds the best.

    Args:
        lengths: The number of tokens of each sequence.
        token_budget: The maximum number of tokens of a group with padding. A longer sequence gets its own group.
        device: The device that computes the groups.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start_cost = GROUP_COST.get(device.type, GROUP_COST["cuda"])
    least, cut = [0], [0]  # of the first positions: the least cost, and where their last group begins
    for end in range(1, len(order) + 1):
        costs = {end - 1: least[end - 1] + start_cost + lengths[order[end - 1]]}
        first = end - 2
        while first >= 0 and (size := (end - first) * lengths[order[first]]) <= token_budget:
            costs[first] = least[first] + start_cost + size
            first -= 1
        cut.append(min(costs, key=lambda begin: (costs[begin], begin)))
        least.append(costs[cut[-1]])
    groups, end = [], len(order)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    return groups[::-1]


def _collate(
    group: Sequence[int],
    prompts: Sequence[TokenIds],
    responses: Sequence[TokenIds],
    weights: Sequence[float],
    device: torch.device,
) -> MicroBatch:
    width = max(max(len(prompts[i]) + len(responses[i]) - 1, 1) for i in group)
    ids = np.zeros((len(group), width), dtype=np.int64)
    parts: list[tuple[Any, Any, Any]] = []
    for row, i in enumerate(group):
        tokens = np.concatenate([np.asarray(prompts[i]), np.asarray(responses[i])])
        ids[row, : len(tokens) - 1] = tokens[:-1]
        start, size = row * width + len(prompts[i]) - 1, len(responses[i])
        token_weights = np.full(size, weights[i], dtype=np.float32)
        parts.append((np.arange(start, start + size), np.asarray(responses[i], dtype=np.int64), token_weights))
    where, targets, joined = (to_device(torch.from_numpy(np.concatenate(part)), device) for part in zip(*parts))
    return MicroBatch(list(group), to_device(torch.from_numpy(ids), device), where, targets, joined)
