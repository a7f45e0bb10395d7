"""Read PyTorch's pickled weights (`.bin`) as tensors only: no code in such a file can run."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from promptkd.errors import UserError
from promptkd.weights.safetensors_io import TensorFile, check_dtypes

# Tensors may share memory (tied weights). Together they may take up to this many times the file's size.
MAX_SHARING = 4


class RefusedError(UserError):
    """The file at `path` is damaged, or holds anything but tensors by name."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} was refused, and nothing in it was run: {reason}")
        self.path = path


def read_tensors(path: Path, legacy: bool = False) -> dict[str, Tensor]:
    """Read the tensors of a `.bin` file, memory-mapped on the CPU.

    Args:
        path: The file.
        legacy: Accept files from before PyTorch 1.6, too. They cannot be mapped and are loaded into memory.

    Returns:
        The tensors by name. They may share memory.

    Raises:
        RefusedError: If the file is damaged or holds anything but plain tensors by name.
    """
    mapped = zipfile.is_zipfile(path)
    if not mapped and not legacy:
        raise RefusedError(
            path,
            "it is damaged, or older than PyTorch 1.6 and cannot be mapped: "
            "load it with torch.load(weights_only=True) and save it again",
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged or hostile file can make the restricted unpickler raise anything
        reason = " ".join(str(error).split()).split(". ")[0][:120]
        raise RefusedError(path, f"it is damaged or holds more than tensors: {reason}") from None
    if not isinstance(content, dict) or not content:
        raise RefusedError(path, f"it holds a {type(content).__name__}, not tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not _is_plain(tensor):
            raise RefusedError(path, f"{name!r} in it is a {type(tensor).__name__}, not a plain tensor")
    _check_sizes(path, content)
    return {name: tensor.detach() for name, tensor in content.items()}


class TorchFile(TensorFile):
    """The tensors of a `.bin` file, memory-mapped."""

    def span(self, name: str, start: int, count: int) -> Tensor:
        return self[name][start : start + count]

    def _open(self) -> None:
        self._tensors = read_tensors(self.path)

    def _read_layout(self) -> dict[str, Tensor]:
        check_dtypes(self.path, self._tensors)
        return {name: torch.empty_like(tensor, device="meta") for name, tensor in self._tensors.items()}

    def _read(self, name: str) -> Tensor:
        return self._tensors[name]


def open_tensors(path: Path) -> TensorFile:
    """Open a `.safetensors` file, or any other as a `.bin` file."""
    return TensorFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _is_plain(value: object) -> bool:
    """Whether a value is a dense CPU tensor without lazy flags."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_conj() or value.is_neg())
    )


def _check_sizes(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse views that repeat their memory: written to disk, a small file of them would fill it."""
    limit, total = path.stat().st_size, 0
    for name, tensor in tensors.items():
        total += tensor.nbytes
        if tensor.nbytes > limit or total > MAX_SHARING * limit:
            raise RefusedError(path, f"{name} would unfold to {tensor.nbytes} bytes, of a file of {limit}")
