"""Reading weight files that may come from anywhere: safetensors, and PyTorch's zip archives as tensors alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from promptkd.errors import UserError
from promptkd.strict_json import read_object
from promptkd.weights.torch_files import read_tensors

CHUNK_BYTES = 16 << 20  # what is worked on at a time
RELEASE_BYTES = 128 << 20  # so much is read before the pages that have become resident are given back

# Also the types that can be written: what safetensors and torch both know and models hold.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`; UserError if it is missing, no plain file name, or a link that leads out of it.

    A snapshot in the Hugging Face cache is made of links into the repository's own folder: those are followed.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise UserError(f"{folder}: {name!r} is not the name of a file in that folder: refused")
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} is missing")
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        raise UserError(f"{path} is a link that leads out of its folder: copy the file itself there")
    return path


def read_json(path: Path) -> dict:
    """A file that holds one JSON object."""
    return read_object(path, "take the model's own file")


class TensorFile:
    """The tensors of one file, memory-mapped. `release()` gives the pages back that reading has made resident.

    shapes, dtypes: by name; `metadata`: the safetensors header's, {} for a pickle file. Errors: UserError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name in self._names():
            tensor = self.tensor(name)
            self.shapes[name], self.dtypes[name] = tuple(tensor.shape), tensor.dtype
            if tensor.dtype not in DTYPES.values():
                raise UserError(f"{path}: {name} is of the type {tensor.dtype}, which cannot be resharded")
        self.metadata = self._metadata()
        self.release()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, mapped: nothing of it is in memory until it is looked at."""
        raise NotImplementedError

    def release(self) -> None:
        """Map the file afresh: the old mapping and its resident pages go as soon as no tensor refers to it."""
        self._open()

    def _open(self) -> None:
        raise NotImplementedError

    def _names(self) -> list[str]:
        raise NotImplementedError

    def _metadata(self) -> dict[str, str]:
        return {}


class SafetensorsFile(TensorFile):
    def _open(self) -> None:
        try:
            self._file = safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{self.path} is damaged or no safetensors file: {error}") from None

    def _names(self) -> list[str]:
        names = list(self._file.keys())
        for name in names:
            kind = self._file.get_slice(name).get_dtype()
            if kind not in DTYPES:
                raise UserError(f"{self.path}: {name} is of the type {kind}, which cannot be resharded")
        return names

    def _metadata(self) -> dict[str, str]:
        return self._file.metadata() or {}

    def tensor(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)


class PickleFile(TensorFile):
    """A `.bin` file, as `promptkd.weights.torch_files` reads it."""

    def _open(self) -> None:
        self._tensors = read_tensors(self.path)

    def _names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def open_file(path: Path) -> TensorFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)


def chunks(tensor: torch.Tensor, limit: int = CHUNK_BYTES) -> Iterator[torch.Tensor]:
    """The tensor as consecutive contiguous parts of at most `limit` bytes (or one row)."""
    if tensor.dim() == 0 or tensor.nbytes <= limit:
        yield tensor.contiguous()
        return
    rows = max(1, limit * len(tensor) // tensor.nbytes)
    for part in tensor.split(rows):
        yield part.contiguous()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor as they lie in memory: a flat uint8 view."""
    return tensor.reshape(-1).view(torch.uint8)


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal bit by bit (a NaN equals itself); shapes and types are equal already."""
    return all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in zip(chunks(left), chunks(right)))
