"""safetensors files written a block at a time, so that saving needs no second copy of what is saved."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

BLOCK = 1 << 22  # elements moved from the device at once
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int | str]:
    """Write tensors (any device) as one safetensors file, synced to disk.

    Returns {"bytes": size, "sha256": hex digest}. Raises OSError as the file system does.
    """
    header, place = {}, 0
    for name, tensor in tensors.items():
        end = place + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            digest.update(block)
            file.write(block)
        for tensor in tensors.values():
            for block in _blocks(tensor):
                digest.update(block)
                file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().reshape(-1)
    for start in range(0, len(flat), BLOCK):
        yield memoryview(flat[start : start + BLOCK].cpu().contiguous().view(torch.uint8).numpy())


class TensorFile(Mapping):
    """A safetensors file as a mapping that reads each tensor when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def span(self, name: str, start: int, count: int) -> Tensor:
        """Elements `start` to `start + count` of a flat tensor; the others are not read."""
        return self._file.get_slice(name)[start : start + count]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def digest_of(path: Path) -> dict[str, int | str]:
    """A file's size and sha256, as `write_tensors` returns them."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}
