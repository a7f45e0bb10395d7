"""Ranks and their collectives, on CPUs and GPUs alike."""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from promptkd.config.options import DeviceSettings
from promptkd.distributed.device import choose_device
from promptkd.distributed.rendezvous import environment_number, rendezvous, shutdown, tensor_parallel_groups
from promptkd.errors import UserError
from promptkd.utils.memory import keep_freed_memory
from promptkd.utils.transfer import to_device


@dataclass(frozen=True)
class Ranks:
    """This process's position in the data-parallel x tensor-parallel grid.

    Attributes:
        dp_rank: Index of this process's share of the examples.
        dp_size: Number of shares.
        device: The device of this process.
        tp_size: Number of neighboring processes that work on the same examples.
        tp_rank: Index of this process among them.
        tp_group: The processes that work on the same examples. None if there is one.
        dp_group: The processes with the same `tp_rank`. None if there is one share.
    """

    dp_rank: int
    dp_size: int
    device: torch.device
    tp_size: int = 1
    tp_rank: int = 0
    tp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None

    @property
    def world(self) -> Ranks:
        """All processes as a grid of data-parallel ranks only."""
        return Ranks(self.dp_rank * self.tp_size + self.tp_rank, self.dp_size * self.tp_size, self.device)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.dp_rank == self.tp_rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over data-parallel ranks, in place. Values on the host stay there, so one rank reads no device."""
        if self.dp_size > 1:
            on_device = to_device(values, self.device)
            dist.all_reduce(on_device, group=self.dp_group)
            if on_device is not values:
                values.copy_(on_device)
        return values

    def broadcast_tp(self, values: Tensor) -> Tensor:
        """Copy the values of the first tensor-parallel rank to the others, in place."""
        if self.tp_size > 1:
            dist.broadcast(values, self.dp_rank * self.tp_size, group=self.tp_group)
        return values

    def all_reduce_max(self, value: int) -> int:
        """Return the largest of all processes' values."""
        if self.world.dp_size == 1:
            return value
        largest = to_device(torch.tensor(value), self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def all_gather_objects(self, objects: list[Any]) -> list[Any]:
        """Concatenate the lists of all data-parallel ranks on every rank. They are sent as JSON, never as pickle."""
        if self.dp_size == 1:
            return objects
        data = torch.frombuffer(bytearray(json.dumps(objects).encode()), dtype=torch.uint8)
        longest = self.all_reduce_max(len(data))
        padded = torch.zeros(longest + 8, dtype=torch.uint8)
        padded[:8] = torch.tensor([len(data)], dtype=torch.int64).view(torch.uint8)
        padded[8 : 8 + len(data)] = data
        parts = [torch.empty_like(padded, device=self.device) for _ in range(self.dp_size)]
        dist.all_gather(parts, padded.to(self.device), group=self.dp_group)
        texts = [part.cpu() for part in parts]
        lengths = [int(text[:8].clone().view(torch.int64)) for text in texts]
        return [x for text, n in zip(texts, lengths) for x in json.loads(bytes(text[8 : 8 + n].tolist()))]

    def on_first(self, action: Callable[[], Any]) -> None:
        """Do something on the first process. If it raises UserError, raise that on all processes."""
        problems: list[str] = []
        if self.is_main:
            try:
                action()
            except UserError as error:
                problems.append(str(error))
        if problems := self.world.all_gather_objects(problems):
            raise UserError(problems[0])

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world.dp_size > 1:
            dist.barrier()


def setup(tp_size: int = 1, settings: DeviceSettings | None = None) -> Ranks:
    """Choose the device and join the other ranks that `torchrun` or `deepspeed` started. Plain `python` is one rank.

    Args:
        tp_size: Number of neighboring processes that work on the same examples.
        settings: How the device computes.

    Raises:
        UserError: `tp_size` does not divide the number of ranks, or the device cannot be used.
        RunError: The other ranks cannot be reached.
    """
    single = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    size = environment_number("WORLD_SIZE", 1)
    missing = [name for name in single if name not in os.environ]
    if size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE={size} is in the environment, {missing[0]} is not: start with torchrun, or unset WORLD_SIZE"
        )
    for name, value in single.items():
        os.environ.setdefault(name, value)
    rank, local = environment_number("RANK"), environment_number("LOCAL_RANK")
    if size > 1 and not 0 < environment_number("MASTER_PORT") < 65536:
        raise UserError(
            f"MASTER_PORT={os.environ['MASTER_PORT']} in the environment is not a port: give one of 1 to 65535"
        )
    if not rank < size:
        raise UserError(f"RANK={rank} and WORLD_SIZE={size} in the environment do not fit: start with torchrun")
    if size % tp_size:
        fits = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise UserError(
            f"model parallel size {tp_size} does not divide the {size} ranks: start a multiple of {tp_size} "
            f"(torchrun --nproc_per_node {tp_size}), or give a --model-parallel-size of {fits}"
        )
    device = choose_device(local, settings or DeviceSettings())
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed uses it as the index of the GPU
    else:
        keep_freed_memory()
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if not dist.is_initialized():
        rendezvous(device, rank, size)
        atexit.register(shutdown)
    groups = tensor_parallel_groups(size, tp_size) if tp_size > 1 else (None, None)
    return Ranks(rank // tp_size, size // tp_size, device, tp_size, rank % tp_size, *groups)
