"""Rollouts that several optimizer steps use, and their advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from promptkd.distributed.ranks import Ranks


class StoredRollout(NamedTuple):
    """A rollout. All tensors are on the CPU and have one entry for each response token.

    Attributes:
        response: Token ids, int64, including end-of-text.
        old: Log-probabilities under the student that sampled the rollout, float32.
        rewards: Scaled and clipped rewards, float32.
        importance: Weights of tokens that were sampled from the mixture, float32.
        own_kl: Reverse KL to the teacher of the response that the student sampled without the teacher.
        own_length: Tokens of that response.
    """

    response: Tensor
    old: Tensor
    rewards: Tensor
    importance: Tensor
    own_kl: float
    own_length: int


@dataclass
class RolloutBuffer:
    """The rollouts of all ranks in the order of their prompts. `number` is the collection's, from 0."""

    number: int
    rollouts: list[StoredRollout]

    @classmethod
    def gathered(cls, number: int, rollouts: dict[int, StoredRollout], ranks: Ranks) -> RolloutBuffer:
        """Exchange the ranks' rollouts, given by their index in the collection, so that every rank has all."""
        local = [[place, *(_plain(part) for part in stored)] for place, stored in rollouts.items()]
        everyone = sorted(ranks.all_gather_objects(local))
        return cls(number, [_stored(*parts) for _, *parts in everyone])

    def state(self) -> dict[str, Tensor]:
        """Return the collection as tensors: its number, the concatenated fields of rollouts, and their lengths."""
        stored = self.rollouts
        return {
            "number": torch.tensor([self.number]),
            "lengths": torch.tensor([len(rollout.response) for rollout in stored]),
            "responses": torch.cat([rollout.response for rollout in stored]),
            "old": torch.cat([rollout.old for rollout in stored]),
            "rewards": torch.cat([rollout.rewards for rollout in stored]),
            "importance": torch.cat([rollout.importance for rollout in stored]),
            "own_kl": torch.tensor([rollout.own_kl for rollout in stored], dtype=torch.float64),
            "own_lengths": torch.tensor([rollout.own_length for rollout in stored]),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> RolloutBuffer:
        """Restore a collection from what `state` returned."""
        lengths = state["lengths"].tolist()
        names = ("responses", "old", "rewards", "importance")
        parts = [torch.split(state[name], lengths) for name in names]
        own = state["own_kl"].tolist(), state["own_lengths"].tolist()
        return cls(int(state["number"]), [StoredRollout(*fields) for fields in zip(*parts, *own)])


def _plain(part: Any) -> Any:
    return part.tolist() if isinstance(part, Tensor) else part


def _stored(
    response: list[int],
    old: list[float],
    rewards: list[float],
    importance: list[float],
    own_kl: float,
    own_length: int,
) -> StoredRollout:
    floats = [torch.tensor(part, dtype=torch.float32) for part in (old, rewards, importance)]
    return StoredRollout(torch.tensor(response), floats[0], floats[1], floats[2], own_kl, own_length)


def returns(rewards: Tensor, gamma: float) -> Tensor:
    """Return the discounted sums sum_k gamma^k rewards[t + k], float32 `(length,)`."""
    total, reversed_sums = 0.0, []
    for reward in reversed(rewards.tolist()):
        total = reward + gamma * total
        reversed_sums.append(total)
    return torch.tensor(reversed_sums[::-1])


def advantages(rewards: Tensor, gamma: float) -> Tensor:
    """Return `returns` divided by the number of remaining tokens, which is the paper's length normalization."""
    return returns(rewards, gamma) / torch.arange(len(rewards), 0, -1)


def whiten(values: list[Tensor], padding: int, ranks: Ranks) -> list[Tensor]:
    """Shift and scale to mean 0 and variance 1 over the values of all ranks and `padding` zeros of this rank."""
    flat = torch.cat(values).double()
    sums = torch.stack([flat.sum(), torch.tensor(float(len(flat) + padding))])
    total, count = ranks.all_reduce_sum(sums).tolist()
    mean = total / count
    squares = (flat - mean).square().sum() + padding * mean**2
    variance = float(ranks.all_reduce_sum(squares)) / count
    return [((value - mean) * (variance + 1e-8) ** -0.5).float() for value in values]
