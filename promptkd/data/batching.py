"""Micro-batches: sequences of prompt and response, grouped by length and padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of prompt and response, padded on the right to the longest.

    The last token of a response is predicted but never read, so it is not among `ids`.
    """

    members: list[int]  # places in the window, row by row
    ids: Tensor  # int64 [rows, longest]
    where: Tensor  # int64 [response tokens]: places of the states that predict them, in the flattened ids
    targets: Tensor  # int64 [response tokens]
    token_weights: Tensor  # float32, (response tokens,): the weight of each token's loss in the step's loss


def make_micro_batches(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    weights: Sequence[float],
    token_budget: int,
    device: torch.device,
    batches: int = 0,
) -> list[MicroBatch]:
    """Sort sequences by length and pack them into micro-batches of at most `token_budget` padded tokens.

    At least `batches` micro-batches come out (every rank has to run as many as the one that needs most):
    larger groups are halved, then a sequence without weight is repeated.
    """
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
    groups = group_by_length(lengths, token_budget)
    while len(groups) < batches and max(map(len, groups)) > 1:
        largest = max(groups, key=len)
        groups.remove(largest)
        groups += [largest[::2], largest[1::2]]
    idle = batches - len(groups)
    made = [_collate(group, prompts, responses, weights, device) for group in groups]
    if idle > 0:
        shortest = [min(range(len(lengths)), key=lengths.__getitem__)]
        made += [_collate(shortest, prompts, responses, [0.0] * len(lengths), device)] * idle
    return made


def group_by_length(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Places sorted by length, longest first, in groups of at most `token_budget` padded tokens."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= token_budget:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _collate(group, prompts, responses, weights, device) -> MicroBatch:
    width = max(max(len(prompts[i]) + len(responses[i]) - 1, 1) for i in group)
    ids = np.zeros((len(group), width), dtype=np.int64)
    where, targets, shares = [], [], []
    for row, i in enumerate(group):
        tokens = np.concatenate([np.asarray(prompts[i]), np.asarray(responses[i])])
        ids[row, : len(tokens) - 1] = tokens[:-1]
        start = row * width + len(prompts[i]) - 1
        where.append(np.arange(start, start + len(responses[i])))
        targets.append(np.asarray(responses[i], dtype=np.int64))
        shares.append(np.full(len(responses[i]), weights[i], dtype=np.float32))
    parts = [np.concatenate(part) for part in (where, targets, shares)]
    where_, targets_, weights_ = (torch.from_numpy(part).to(device) for part in parts)
    return MicroBatch(list(group), torch.from_numpy(ids).to(device), where_, targets_, weights_)
