"""Writing weight files piece by piece: the file is laid out first, since all shapes are known, then filled in place."""

from __future__ import annotations

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch.serialization import skip_data

from promptkd.errors import UserError
from promptkd.weights.tensor_files import DTYPES, RELEASE_BYTES, as_bytes, chunks, open_file

Spec = tuple[torch.dtype, tuple[int, ...]]
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CRC_FOLLOWS = 8  # flag of a zip record: its CRC-32 stands behind the data, not before it


def nbytes(spec: Spec) -> int:
    dtype, shape = spec
    return dtype.itemsize * torch.Size(shape).numel()


class TensorWriter:
    """One output file. `write` takes each tensor's parts in order, the tensors themselves in any order; then `finish`.

    `specs`: dtype and shape of each tensor. A CRC-32 of all bytes handed in is kept for each tensor, for `verify`.
    """

    def __init__(self, path: Path, specs: dict[str, Spec], metadata: dict[str, str]) -> None:
        self.path, self.specs, self.metadata = path, specs, metadata
        self._written = dict.fromkeys(specs, 0)
        self.checksums = dict.fromkeys(specs, 0)
        self._offsets = self._lay_out()
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - until finish() or close()

    def write(self, name: str, part: torch.Tensor) -> None:
        """The next part of a tensor: contiguous, of its dtype."""
        data = memoryview(as_bytes(part).numpy())
        self.checksums[name] = zlib.crc32(data, self.checksums[name])
        at = self._offsets[name] + self._written[name]
        self._written[name] += len(data)
        while len(data):
            done = os.pwrite(self._file.fileno(), data, at)
            data, at = data[done:], at + done

    def finish(self) -> None:
        """Flush everything to the disk; all tensors must be written by now."""
        for name, spec in self.specs.items():
            if self._written[name] != nbytes(spec):
                raise AssertionError(f"{self.path}: {self._written[name]} of {nbytes(spec)} bytes of {name}")
        self._complete()
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that the verification reads the disk, not the page cache
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._file.close()

    def close(self) -> None:
        self._file.close()

    def verify(self, progress: Callable[[int], object]) -> None:
        """Read the finished file back as any reader would and compare names, shapes, types and checksums."""
        file = open_file(self.path)
        if {name: (file.dtypes[name], file.shapes[name]) for name in file.shapes} != self.specs:
            raise UserError(f"{self.path} reads back with other tensors than were written: is the disk sound?")
        resident = 0
        for name, spec in self.specs.items():
            checksum = 0
            for part in chunks(file.tensor(name)):
                checksum = zlib.crc32(memoryview(as_bytes(part).numpy()), checksum)
                progress(part.nbytes)
                del part
            if checksum != self.checksums[name]:
                raise UserError(f"{self.path}: {name} reads back with another checksum: is the disk sound?")
            resident += nbytes(spec)
            if resident > RELEASE_BYTES:
                resident = 0
                file.release()

    def _lay_out(self) -> dict[str, int]:
        """Make the file with its full size; where each tensor's bytes begin."""
        raise NotImplementedError

    def _complete(self) -> None:
        """What is left once all bytes are there."""


class SafetensorsWriter(TensorWriter):
    """Format: 8 bytes with the header's length, the header in JSON, then the tensors' bytes without gaps."""

    def _lay_out(self) -> dict[str, int]:
        header: dict[str, object] = {"__metadata__": self.metadata}
        end = 0
        # The widest types first: then every tensor begins at a multiple of its element's size.
        for name, spec in sorted(self.specs.items(), key=lambda item: -item[1][0].itemsize):
            begin, end = end, end + nbytes(spec)
            header[name] = {
                "dtype": DTYPE_NAMES[spec[0]],
                "shape": list(spec[1]),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        with open(self.path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(start + end)
        return {name: start + header[name]["data_offsets"][0] for name in self.specs}


class PickleWriter(TensorWriter):
    """A file as `torch.save` writes it: torch lays it out and leaves the numbers' places empty (`skip_data`)."""

    def _lay_out(self) -> dict[str, int]:
        # Address space only: skip_data looks at none of these bytes, so none of them becomes memory.
        hollow = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in self.specs.items()}
        with skip_data():
            torch.save(hollow, self.path)
        records = {}
        with zipfile.ZipFile(self.path) as archive, open(self.path, "rb") as file:
            for record in archive.infolist():
                file.seek(record.header_offset + 26)
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                records[record.filename.partition("/")[2]] = file.tell() + name_length + extra_length
        # Storages are numbered in the order in which they are pickled.
        return {name: records[f"data/{number}"] for number, name in enumerate(self.specs)}

    def _complete(self) -> None:
        """Put the CRC-32 of each tensor where the archive wants it. torch does not look at them; unzip does."""
        with zipfile.ZipFile(self.path) as archive:
            entry, records = archive.start_dir, archive.infolist()
        tensors = {f"data/{number}": name for number, name in enumerate(self.specs)}
        file = self._file.fileno()
        for record in records:
            name = tensors.get(record.filename.partition("/")[2])
            if name is not None and record.file_size:
                crc = struct.pack("<I", self.checksums[name])
                os.pwrite(file, crc, entry + 16)
                if record.flag_bits & CRC_FOLLOWS:
                    os.pwrite(file, crc, self._offsets[name] + record.file_size + 4)
                else:
                    os.pwrite(file, crc, record.header_offset + 14)
            entry += 46 + sum(struct.unpack("<HHH", os.pread(file, 6, entry + 28)))


def open_writer(path: Path, specs: dict[str, Spec], metadata: dict[str, str]) -> TensorWriter:
    """By the name's ending. `metadata` is written where the format has a place for it."""
    return (SafetensorsWriter if path.suffix == ".safetensors" else PickleWriter)(path, specs, metadata)
