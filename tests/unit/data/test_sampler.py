"""The order of examples is that of torch's DistributedSampler, and is drawn once an epoch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DistributedSampler

from minillm_baselines.rollout_sampler import RolloutSampler
from promptkd.data.sampler import StepSampler


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """Record the sizes of the permutations that are drawn."""
    sizes, randperm = [], torch.randperm

    def noted(size, **how):
        sizes.append(size)
        return randperm(size, **how)

    monkeypatch.setattr(torch, "randperm", noted)
    return sizes


def steps(windows, count: int) -> list[list[int]]:
    return [windows.indices(step) for step in range(1, count + 1)]


@pytest.mark.parametrize("rank", [0, 1])
def test_order_is_that_of_distributed_sampler(rank):
    windows, sampler = StepSampler(23, 2, 2, ranks=2, rank=rank, seed=7), []
    for epoch in range(3):
        torch_own = DistributedSampler(range(23), 2, rank, seed=7, drop_last=True)
        torch_own.set_epoch(epoch)
        sampler += list(torch_own)[:8]  # 2 steps of 4; what is left over is dropped
    assert [row for step in steps(windows, 6) for row in step] == sampler


@pytest.mark.parametrize("published", [False, True])
def test_order_is_drawn_once_an_epoch(published, drawn):
    windows = StepSampler(50, 2, 2, published=published)
    steps(windows, 3 * windows.steps_per_epoch)
    assert drawn == [50] * 3
    fresh = [StepSampler(50, 2, 2, published=published).indices(step) for step in range(1, 31)]
    assert steps(windows, 30) == fresh  # also after a jump back to the first epoch


def test_rollout_sampler_draws_prompts_and_corpus_once_an_epoch(drawn):
    corpus = StepSampler(40, 2, 1, seed=3)
    prompts = RolloutSampler(30, 6, 4, 1, 2, 1)
    for step in range(1, 21):
        prompts.indices(step), corpus.indices(step)
    assert drawn.count(40) == 1 and drawn.count(30) <= 2


def test_step_samplers_of_equal_sizes_are_equal_after_use():
    one, other = StepSampler(50, 2, 2), StepSampler(50, 2, 2)
    one.indices(1)
    assert one == other and repr(one) == repr(other)
