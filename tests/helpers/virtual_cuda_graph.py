"""What stands in for torch.cuda.CUDAGraph on a virtual GPU.

As on CUDA, capture records operators with their addresses, shapes and Python numbers, and runs none of them; a replay
runs them. Capture refuses what CUDA refuses: an operator that waits for the GPU, or a copy between it and the host.
A replay raises AssertionError if an operator's result has another shape than during capture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from helpers.virtual_cuda import VirtualCuda


class VirtualGraph:
    """Operators that were captured, with their operands and results."""

    gpu: VirtualCuda

    def __init__(self) -> None:
        self.operators: list[tuple[Any, tuple, dict[str, Any], Any]] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # storage -> (its tensor, values before capture)
        self.made: set[int] = set()  # storages of results

    def capture_begin(self, pool=None, capture_error_mode: str = "global") -> None:
        assert self.gpu.capturing is None and not self.operators
        self.gpu.capturing = self

    def capture_end(self) -> None:
        """Undo what the operators wrote: they were captured, not run."""
        self.gpu.capturing = None
        with _disable_current_modes():
            for tensor, values in self.before.values():
                tensor.copy_(values)
        self.before.clear()

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def keep_written(self, func, args, kwargs) -> None:
        """Keep the values of operands that an operator writes to, and that were there before capture."""
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, torch.Tensor):
                key = _storage(value)
                if key not in self.before and key not in self.made:
                    with _disable_current_modes():
                        everything = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
                        self.before[key] = everything, everything.clone()

    def add(self, func, args, kwargs, result) -> None:
        given = {_storage(each) for each in _tensors((args, kwargs))}  # of which a result may be a view
        self.made |= {_storage(each) for each in _tensors(result)} - given
        self.operators.append((func, args, kwargs, result))

    def replay(self) -> None:
        self.gpu.replays[self.gpu.current] += 1
        for func, args, kwargs, result in self.operators:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                assert old.shape == new.shape, f"{func}: {tuple(old.shape)} became {tuple(new.shape)}"
                if old.data_ptr() != new.data_ptr() and old.numel():
                    with _disable_current_modes():
                        old.copy_(new)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(result) -> list[torch.Tensor]:
    return [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
