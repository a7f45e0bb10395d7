"""Rollouts that several optimizer steps learn from: what is kept of them, and the advantages made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from promptkd.distributed.ranks import Ranks


class StoredRollout(NamedTuple):
    """One rollout. All tensors are on the CPU and have one entry for each response token.

    response: int64, end-of-text included. old: float32 log-probability under the student that was there then.
    rewards: float32, scaled and clipped. importance: float32 weight of a token drawn from the mixture.
    own_kl, own_length: reverse KL to the teacher and tokens of the answer the student gave alone.
    """

    response: Tensor
    old: Tensor
    rewards: Tensor
    importance: Tensor
    own_kl: float
    own_length: int


@dataclass
class RolloutBuffer:
    """The rollouts of all ranks, in the prompts' order; `number` counts collections from 0."""

    number: int
    rollouts: list[StoredRollout]

    @classmethod
    def gathered(cls, number: int, rollouts: dict[int, StoredRollout], ranks: Ranks) -> RolloutBuffer:
        """Exchange the ranks' rollouts (by their place in the collection): every rank holds all."""
        mine = [[place, *(_plain(part) for part in stored)] for place, stored in rollouts.items()]
        everyone = sorted(ranks.all_gather_objects(mine))
        return cls(number, [_stored(*parts) for _, *parts in everyone])

    def state(self) -> dict[str, Tensor]:
        """As plain tensors: the number, and the rollouts' fields end to end with their lengths to part them."""
        stored = StoredRollout(*zip(*self.rollouts))
        return {
            "number": torch.tensor([self.number]),
            "lengths": torch.tensor([len(response) for response in stored.response]),
            "responses": torch.cat(stored.response),
            "old": torch.cat(stored.old),
            "rewards": torch.cat(stored.rewards),
            "importance": torch.cat(stored.importance),
            "own_kl": torch.tensor(stored.own_kl, dtype=torch.float64),
            "own_lengths": torch.tensor(stored.own_length),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> RolloutBuffer:
        lengths = state["lengths"].tolist()
        names = ("responses", "old", "rewards", "importance")
        parts = [state[name].split(lengths) for name in names]
        own = state["own_kl"].tolist(), state["own_lengths"].tolist()
        return cls(int(state["number"]), [StoredRollout(*fields) for fields in zip(*parts, *own)])


def _plain(part: Any) -> Any:
    return part.tolist() if isinstance(part, Tensor) else part


def _stored(response, old, rewards, importance, own_kl, own_length) -> StoredRollout:
    floats = (torch.tensor(part, dtype=torch.float32) for part in (old, rewards, importance))
    return StoredRollout(torch.tensor(response), *floats, own_kl, own_length)


def returns(rewards: Tensor, gamma: float) -> Tensor:
    """The sum of this and the later rewards, discounted: float32 [length], sum_k gamma^k rewards[t + k]."""
    total, reversed_sums = 0.0, []
    for reward in reversed(rewards.tolist()):
        total = reward + gamma * total
        reversed_sums.append(total)
    return torch.tensor(reversed_sums[::-1])


def advantages(rewards: Tensor, gamma: float) -> Tensor:
    """`returns` over the tokens left, this one included: the paper's length normalisation."""
    return returns(rewards, gamma) / torch.arange(len(rewards), 0, -1)


def whiten(values: list[Tensor], padding: int, ranks: Ranks) -> list[Tensor]:
    """Shift and scale to mean 0 and variance 1 over all values of all ranks and this rank's `padding` zeros."""
    flat = torch.cat(values).double()
    sums = torch.stack([flat.sum(), torch.tensor(float(len(flat) + padding))])
    total, count = ranks.all_reduce_sum(sums.to(ranks.device)).tolist()
    mean = total / count
    squares = (flat - mean).square().sum() + padding * mean**2
    variance = float(ranks.all_reduce_sum(squares.to(ranks.device))) / count
    return [((value - mean) * (variance + 1e-8) ** -0.5).float() for value in values]
