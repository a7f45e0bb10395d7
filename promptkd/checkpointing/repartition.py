"""Optimizer state that was saved by another number of ranks: each rank fetches the spans that it holds now.

Every rank's file says which elements of which parameter its flat tensors hold, so no knowledge of how DeepSpeed
shared them out then is needed. Only the spans are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from promptkd.engine.engine import TrainEngine
from promptkd.errors import UserError
from promptkd.weights.safetensors_io import TensorFile


def pieces_of(learner: TrainEngine, i: int) -> Tensor:
    """What this rank's master `i` holds: int64 [pieces, 4]: parameter, first element, elements, place in the master."""
    optimizer, rank = learner.engine.optimizer, learner.dp_rank
    found = []
    if learner.stage == 3:
        place = 0
        for number, parameter in enumerate(optimizer.fp16_groups[i]):
            share = parameter.partition_numel()
            held = min(share, parameter.ds_numel - rank * share)
            found.append((number, rank * share, held, place))
            place += share
    else:
        share = optimizer.partition_size[i]
        numbers = {id(parameter): number for number, parameter in enumerate(optimizer.bit16_groups[i])}
        offsets = optimizer.round_robin_bit16_offsets[i]
        for parameter, offset in zip(optimizer.round_robin_bit16_groups[i], offsets, strict=True):
            start, end = max(offset, rank * share), min(offset + parameter.numel(), (rank + 1) * share)
            found.append((numbers[id(parameter)], start - offset, end - start, start - rank * share))
    return torch.tensor([piece for piece in found if piece[2] > 0], dtype=torch.int64).reshape(-1, 4)


class Resharded:
    """The files of all ranks then, as the mapping of this rank's tensors now (see engine_state.state_tensors)."""

    def __init__(self, learner: TrainEngine, files: Sequence[TensorFile], sizes: Sequence[int]) -> None:
        self.learner, self.files, self.sizes = learner, files, sizes
        self.then = [[file[f"{i}.pieces"].tolist() for i in range(len(sizes))] for file in files]

    def __iter__(self):
        return iter(self.files[0])

    def __getitem__(self, name: str) -> Tensor:
        first = self.files[0]
        i = int(name.partition(".")[0])
        if name.endswith(".pieces") or first[name].ndim == 0:  # a counter: the same on all ranks
            return first[name]
        made = torch.zeros(self.sizes[i], dtype=first[name].dtype)
        for number, start, count, place in pieces_of(self.learner, i).tolist():
            missing = count
            for file, pieces in zip(self.files, self.then):
                for other, from_, held, where in pieces[i]:
                    a, b = max(start, from_), min(start + count, from_ + held)
                    if other == number and a < b:
                        made[place + a - start : place + b - start] = file.span(name, where + a - from_, b - a)
                        missing -= b - a
            if missing:
                raise UserError(f"the checkpoint lacks {missing} elements of tensor {name}: another model's?")
        return made
