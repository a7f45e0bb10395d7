"""Read and write safetensors files one tensor at a time, so that no second copy of a model is in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from promptkd.errors import UserError
from promptkd.utils.files import FileDigest, digest_of, remove

BLOCK_BYTES = 16 << 20  # bytes moved from the device at once
RELEASE_BYTES = 128 << 20  # bytes read from a mapping before its resident pages are released

# The dtypes that safetensors and torch share and that models use.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, memory-mapped: each one is read when it is accessed.

    Args:
        path: The file. Subclasses read other formats.

    Attributes:
        layout: Every tensor on the meta device, for its shape and dtype.
        metadata: Text fields of the header.

    Raises:
        UserError: If the file is damaged, or holds a dtype that is not in `DTYPES`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self._mapped = 0
        self._open()
        self.layout = self._read_layout()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.layout:
            raise KeyError(name)
        if self._mapped > RELEASE_BYTES:
            # A new mapping. The old one and its resident pages go when no tensor refers to them.
            self._mapped = 0
            self._open()
        self._mapped += self.layout[name].nbytes
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def span(self, name: str, start: int, count: int) -> Tensor:
        """Read `count` elements of a flat tensor, beginning with element `start`."""
        tensor: Tensor = self._file.get_slice(name)[start : start + count]
        return tensor

    def _open(self) -> None:
        try:
            self._file: Any = safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{self.path} is damaged or not a safetensors file ({error}): get it again") from None

    def _read_layout(self) -> dict[str, Tensor]:
        layout = {}
        for name in self._file.keys():  # noqa: SIM118 - not a mapping
            header = self._file.get_slice(name)
            if header.get_dtype() not in DTYPES:
                raise UserError(
                    f"{self.path}: {name} has the unsupported dtype {header.get_dtype()}: dequantize the model first"
                )
            layout[name] = torch.empty(header.get_shape(), dtype=DTYPES[header.get_dtype()], device="meta")
        self.metadata = self._file.metadata() or {}
        return layout

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


def write_tensors(
    path: Path,
    layout: Mapping[str, Tensor],
    tensors: Iterable[Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> FileDigest:
    """Write a safetensors file and flush it to disk. An error leaves no incomplete file behind.

    Args:
        path: The file to create.
        layout: Tensors for their names, shapes and dtypes, in the order of the file. They may share memory.
        tensors: The tensors to write, in the order of `layout`, on any device. They are read one at a time. By default
            those of `layout` are written. If this is given, those may be on the meta device.
        metadata: Text fields for the header.

    Returns:
        The file's size and checksum, as `digest_of` returns them.

    Raises:
        UserError: If a dtype is not in `DTYPES`.
    """
    check_dtypes(path, layout)
    header = _header(layout, metadata)
    digest = hashlib.sha256(header)
    try:
        with open(path, "wb") as file:
            file.write(header)
            for (name, expected), tensor in zip(layout.items(), tensors or layout.values(), strict=True):
                if (expected.dtype, expected.shape) != (tensor.dtype, tensor.shape):
                    raise ValueError(f"{path}: {name} {tensor.dtype} {list(tensor.shape)} differs from the layout")
                for block in _blocks(tensor):
                    digest.update(block)
                    file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return {"bytes": file.tell(), "sha256": digest.hexdigest()}
    except BaseException:
        remove(path)
        raise


def write_verified(
    path: Path, layout: Mapping[str, Tensor], tensors: Iterable[Tensor] | None, metadata: Mapping[str, str]
) -> None:
    """Call `write_tensors` and compare the file on disk with what was written.

    Raises:
        UserError: If they differ.
    """
    if write_tensors(path, layout, tensors, metadata) != digest_of(path):
        raise UserError(f"{path} reads back with another checksum: check the disk")


def check_dtypes(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise `UserError` for a dtype that is not in `DTYPES`."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise UserError(f"{path}: {name} has the unsupported dtype {tensor.dtype}: dequantize the model first")


def widest_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sort tensors by the size of their elements. Written in this order, all of them are aligned in the file."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))


def have_same_bytes(left: Tensor, right: Tensor) -> bool:
    """Whether two CPU tensors have the same dtype, shape and bits. A NaN equals itself."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)))


def _header(layout: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    """Return the beginning of a safetensors file: 8 bytes with the length of the JSON text, then the text."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in layout.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data
    return len(text).to_bytes(8, "little") + text


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes in blocks of bounded size."""
    flat = tensor.detach().reshape(-1)
    step = max(1, BLOCK_BYTES // tensor.element_size())
    for start in range(0, len(flat), step):
        yield flat[start : start + step].cpu().contiguous().view(torch.uint8).numpy().data
