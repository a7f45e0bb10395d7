"""PyTorch's pickled weights (`.bin`) read as tensors alone: nothing in such a file is run."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from promptkd.errors import UserError

MOST_SHARING = 4  # times the file's size that tensors in shared memory (tied weights) may come to together


class RefusedError(UserError):
    """The file at `path` is damaged, or holds anything but tensors by name."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} was refused, and nothing in it was run: {why}")
        self.path = path


def read_tensors(path: Path, old_format: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of one file by name, on the CPU, memory-mapped: nothing of them is in memory until it is looked at.

    old_format: take files from before PyTorch 1.6, too; they are no zip archives and come into memory whole.
    Tensors may share memory. Raises RefusedError.
    """
    mapped = zipfile.is_zipfile(path)
    if not mapped and not old_format:
        raise RefusedError(
            path,
            "it is damaged, or older than PyTorch 1.6 and cannot be mapped: "
            "load it with torch.load(weights_only=True) and save it again",
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a broken or hostile file may make the restricted unpickler raise anything
        reason = " ".join(str(error).split()).split(". ")[0][:120]
        raise RefusedError(path, f"it is damaged or holds more than tensors: {reason}") from None
    if not isinstance(content, dict) or not content:
        raise RefusedError(path, f"it holds a {type(content).__name__}, not tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not _is_plain(tensor):
            raise RefusedError(path, f"{name!r} in it is a {type(tensor).__name__}, not a plain tensor")
    _check_sizes(path, content)
    return {name: tensor.detach() for name, tensor in content.items()}


def _is_plain(value: object) -> bool:
    """Whether it is a tensor whose numbers lie in memory as they are."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_conj() or value.is_neg())
    )


def _check_sizes(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Refuse views that repeat their memory: written down, a small file of them would fill any disk."""
    limit, total = path.stat().st_size, 0
    for name, tensor in tensors.items():
        total += tensor.nbytes
        if tensor.nbytes > limit or total > MOST_SHARING * limit:
            raise RefusedError(path, f"{name} would unfold to {tensor.nbytes} bytes, of a file of {limit}")
