"""The replay buffer of DistiLLM: the student's latest responses with their prompts."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from promptkd.data.dataset import Example
from promptkd.distributed.ranks import Ranks

Sequences = tuple[NDArray[Any], NDArray[Any]]


class ReplayBuffer:
    """Prompts and responses of all ranks, the oldest first. Every rank has the same content.

    Args:
        capacity: Number of responses to keep.
    """

    def __init__(self, capacity: int) -> None:
        self.items: deque[Sequences] = deque(maxlen=capacity)

    @property
    def is_full(self) -> bool:
        """Whether the buffer has reached its capacity."""
        return len(self.items) == self.items.maxlen

    def add(self, answered: list[tuple[Example, NDArray[Any]]], ranks: Ranks) -> None:
        """Exchange the responses of a step between ranks, and add them in the order of the examples' numbers."""
        local = [[example.index, example.prompt.tolist(), response.tolist()] for example, response in answered]
        for _, prompt, response in sorted(ranks.all_gather_objects(local)):
            self.items.append((np.array(prompt, dtype=np.int64), np.array(response, dtype=np.int64)))

    def draw(self, uniform: float) -> Sequences:
        """Return the prompt and response that a uniform number in [0, 1) selects."""
        return self.items[int(uniform * len(self.items))]

    def state(self) -> dict[str, Tensor]:
        """Return the content as concatenated sequences and their lengths."""
        state = {}
        for name, column in (("prompt", 0), ("response", 1)):
            sequences = [torch.from_numpy(item[column]) for item in self.items]
            state[f"{name}_lengths"] = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.long)
            state[f"{name}s"] = torch.cat([torch.empty(0, dtype=torch.long), *sequences])
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        prompts, responses = (
            [part.numpy() for part in torch.split(state[f"{name}s"], state[f"{name}_lengths"].tolist())]
            for name in ("prompt", "response")
        )
        self.items.clear()
        self.items.extend(zip(prompts, responses))
