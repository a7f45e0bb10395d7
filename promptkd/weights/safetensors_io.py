"""Read and write safetensors files one tensor at a time, so that no second copy of a model is in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from promptkd.errors import UserError
from promptkd.utils.files import FileDigest

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
            raise UserError(f"{self.path} is damaged or not a safetensors file: {error}") from None

    def _read_layout(self) -> dict[str, Tensor]:
        layout = {}
        for name in self._file.keys():  # noqa: SIM118 - not a mapping
            header = self._file.get_slice(name)
            if header.get_dtype() not in DTYPES:
                raise UserError(f"{self.path}: {name} has the unsupported dtype {header.get_dtype()}")
            layout[name] = torch.empty(header.get_shape(), dtype=DTYPES[header.get_dtype()], device="meta")
        self.metadata = self._file.metadata() or {}
        return layout

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


class SafetensorsWriter:
    """Write a safetensors file one tensor at a time.

    The format is 8 bytes with the header's length, the header in JSON, then the tensors' bytes without gaps.

    Args:
        path: The file to create.
        layout: Tensors for their names, shapes and dtypes, in the order in which they will be written. They may be on
            the meta device.
        metadata: Text fields for the header.
    """

    def __init__(self, path: Path, layout: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        self.path, self.layout = path, layout
        self._remaining = list(layout)
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, tensor in layout.items():
            start, end = end, end + tensor.nbytes
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the data
        self._digest = hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115 - closed by finish() or close()
        self._write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor of the layout, which may be on any device."""
        expected = self.layout[self._remaining.pop(0)] if self._remaining[:1] == [name] else None
        if expected is None or (expected.dtype, expected.shape) != (tensor.dtype, tensor.shape):
            raise ValueError(f"{self.path}: {name} {tensor.dtype} {list(tensor.shape)} is not the layout's next tensor")
        flat = tensor.detach().reshape(-1)
        step = max(1, BLOCK_BYTES // tensor.element_size())
        for start in range(0, len(flat), step):
            block = flat[start : start + step].cpu().contiguous()
            self._write(block.view(torch.uint8).numpy().data)

    def finish(self) -> FileDigest:
        """Flush the file to disk and close it. Return its size and checksum."""
        if self._remaining:
            raise ValueError(f"{self.path}: {self._remaining[0]} has not been written")
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        return {"bytes": size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Close the file, complete or not."""
        self._file.close()

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileDigest:
    """Write tensors from any device as a safetensors file and flush it to disk.

    Args:
        path: The file to create.
        tensors: The tensors by name. They may share memory.

    Returns:
        The file's size and checksum, as `digest_of` returns them.
    """
    writer = SafetensorsWriter(path, tensors)
    try:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        return writer.finish()
    finally:
        writer.close()


def have_same_bytes(left: Tensor, right: Tensor) -> bool:
    """Whether two CPU tensors have the same dtype, shape and bits. A NaN equals itself."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)))
