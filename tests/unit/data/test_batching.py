"""Micro-batches hold every sequence once, stay within their budget, and take the least time."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from promptkd.data.batching import GROUP_COST, group_with_little_padding

CPU = torch.device("cpu")


def cost(lengths: list[int], groups: list[list[int]], device: str = "cpu") -> int:
    return sum(len(group) * max(lengths[i] for i in group) + GROUP_COST[device] for group in groups)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("seed", range(5))
def test_group_with_little_padding_finds_the_least_cost(seed, device):
    """It equals the best of all ways to cut the sorted sequences."""
    draw = random.Random(seed)
    lengths = [draw.choice([3, 40, 90, 200, 400]) + draw.randrange(20) for _ in range(9)]
    groups = group_with_little_padding(lengths, 500, torch.device(device))
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(9))
    assert all(len(group) == 1 or len(group) * lengths[group[0]] <= 500 for group in groups)
    order = sorted(range(9), key=lambda i: (-lengths[i], i))
    assert list(itertools.chain.from_iterable(groups)) == order  # longest first
    ways = []
    for count in range(9):
        for cuts in itertools.combinations(range(1, 9), count):
            edges = [0, *cuts, 9]
            way = [order[a:b] for a, b in itertools.pairwise(edges)]
            if all(len(group) == 1 or len(group) * lengths[group[0]] <= 500 for group in way):
                ways.append(cost(lengths, way, device))
    assert cost(lengths, groups, device) == min(ways)


def test_group_with_little_padding_of_equal_lengths_fills_the_budget():
    """The plan counts the forward passes of full length in this way (planning/setting.py)."""
    assert [len(group) for group in group_with_little_padding([512] * 9, 2048, CPU)] in ([4, 4, 1], [1, 4, 4])
    assert group_with_little_padding([5000, 10], 2048, CPU) == [[0], [1]]
    assert group_with_little_padding([], 2048, CPU) == []
