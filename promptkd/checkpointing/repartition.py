"""Load optimizer state that another number of ranks saved: each rank reads the spans that it holds now.

Each file records which elements of which parameter its flat tensors hold. So loading does not depend on how
DeepSpeed partitioned them, and only the needed spans are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from promptkd.engine.engine import TrainEngine
from promptkd.errors import UserError
from promptkd.weights.safetensors_io import TensorFile


def pieces_of(learner: TrainEngine, i: int) -> Tensor:
    """Return what this rank's master `i` holds.

    Returns:
        int64 `(pieces, 4)`: number of the parameter, first element in it, count, and first element in the master.
    """
    optimizer, rank = learner.engine.optimizer, learner.dp_rank
    pieces = []
    if learner.stage == 3:
        place = 0
        for number, parameter in enumerate(optimizer.fp16_groups[i]):
            share = parameter.partition_numel()
            held = min(share, parameter.ds_numel - rank * share)
            pieces.append((number, rank * share, held, place))
            place += share
    else:
        share = optimizer.partition_size[i]
        numbers = {id(parameter): number for number, parameter in enumerate(optimizer.bit16_groups[i])}
        offsets = optimizer.round_robin_bit16_offsets[i]
        for parameter, offset in zip(optimizer.round_robin_bit16_groups[i], offsets, strict=True):
            start, end = max(offset, rank * share), min(offset + parameter.numel(), (rank + 1) * share)
            pieces.append((numbers[id(parameter)], start - offset, end - start, start - rank * share))
    return torch.tensor([piece for piece in pieces if piece[2] > 0], dtype=torch.int64).reshape(-1, 4)


class RepartitionedState(Mapping[str, Tensor]):
    """This rank's tensors, as `optimizer_state.state_tensors` names them, read from the files of other partitions.

    Args:
        learner: The engine that will hold the tensors.
        files: The files of all ranks of the run that saved them.
        sizes: Elements of each of this rank's masters.
    """

    def __init__(self, learner: TrainEngine, files: Sequence[TensorFile], sizes: Sequence[int]) -> None:
        self.learner, self.files, self.sizes = learner, files, sizes
        self.saved_pieces = [[file[f"{i}.pieces"].tolist() for i in range(len(sizes))] for file in files]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files[0])

    def __len__(self) -> int:
        return len(self.files[0])

    def __getitem__(self, name: str) -> Tensor:
        first = self.files[0]
        i = int(name.partition(".")[0])
        if name.endswith(".pieces") or first[name].ndim == 0:  # counters are the same on all ranks
            return first[name]
        tensor = torch.zeros(self.sizes[i], dtype=first[name].dtype)
        for number, start, count, place in pieces_of(self.learner, i).tolist():
            missing = count
            for file, pieces in zip(self.files, self.saved_pieces):
                for other, from_, held, where in pieces[i]:
                    a, b = max(start, from_), min(start + count, from_ + held)
                    if other == number and a < b:
                        tensor[place + a - start : place + b - start] = file.span(name, where + a - from_, b - a)
                        missing -= b - a
            if missing:
                raise UserError(f"the checkpoint lacks {missing} elements of tensor {name}: resume with the same model")
        return tensor
