"""The published token files: `<name>.bin` holds the ids of all rows, `<name>.idx` the place of each row.

The index is little-endian:

    magic "MMIDIDX" 0 0 | uint64 version 1 | uint8 dtype code | uint64 rows | uint64 documents
    int32 tokens of each row | int64 byte offset of each row | int64 first row of each document

A row is prompt, marker, response. The marker is the largest number of the dtype, which is not a token. A row without a
marker is plain text. Everything in a file is checked before it is used.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from operator import index as as_int
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from promptkd.errors import UserError
from promptkd.utils.files import atomic_files

Ids = NDArray[np.int64]

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LARGEST_UINT16_VOCABULARY = 65_500
REMEDY = "make it again with tools/process_data.py"
_BLOCK = 1 << 22  # tokens checked together, so that memory does not grow with the file


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the narrowest dtype of the format for `vocab_size` token ids and a marker."""
    return DTYPES[8] if vocab_size <= LARGEST_UINT16_VOCABULARY else DTYPES[4]


def marker_of(dtype: np.dtype[Any]) -> int:
    """Return the number between prompt and response: 65535 for uint16, 2147483647 for int32."""
    return int(np.iinfo(dtype).max)


def join_row(prompt: Sequence[int] | Ids, response: Sequence[int] | Ids, dtype: np.dtype[Any]) -> Ids:
    """Return one row of a token file: prompt, marker, response."""
    return np.concatenate([np.asarray(part, np.int64) for part in (prompt, [marker_of(dtype)], response)])


def split_row(row: Ids, marker: int) -> tuple[Ids, Ids]:
    """Return (prompt, response) of a row. Without a marker, the first token is the prompt."""
    places = np.flatnonzero(row == marker)
    if len(places) > 1:
        raise UserError(f"a row has {len(places)} markers ({marker}) between prompt and response: {REMEDY}")
    if len(places) == 0:
        return row[:1], row[1:]
    return row[: places[0]], row[places[0] + 1 :]


class TokenFile:
    """Rows of token ids, memory-mapped: `len(file)`, `file[i]` -> int64 `(tokens,)` with the marker.

    Opening checks the index against the sizes of both files. Reading a row checks that it has at most one marker, and
    its ids against `vocab_size` (None: not checked). All errors are UserError and name the file.
    """

    def __init__(self, path_prefix: str | Path, vocab_size: int | None = None) -> None:
        self.bin_path, self.idx_path = Path(f"{path_prefix}.bin"), Path(f"{path_prefix}.idx")
        self.vocab_size = vocab_size
        try:
            self.dtype, self._offsets = _read_index(self.idx_path, _file_size(self.bin_path))
            self._tokens = np.memmap(self.bin_path, self.dtype, mode="r").view(np.ndarray)
        except OSError as error:
            raise UserError(f"{error.filename or self.idx_path}: cannot be read: {error.strerror}") from None
        self.marker = marker_of(self.dtype)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Ids:
        row = as_int(index)
        if not 0 <= row < len(self):
            raise IndexError(f"{self.bin_path}: row {row} of {len(self)}")
        self._markers(row, row + 1)
        ids: Ids = self._tokens[self._offsets[row] : self._offsets[row + 1]].astype(np.int64)
        return ids

    def row_lengths(self) -> Ids:
        """Return the number of tokens of each row with the marker, `(rows,)`."""
        return np.diff(self._offsets)

    def prompt_lengths(self, rows: int | None = None) -> Ids:
        """Return the number of tokens before the marker in each of the first `rows` rows, -1 without one, `(rows,)`.

        This reads and checks all tokens of these rows, so that errors appear before a run begins.
        """
        count = len(self) if rows is None else min(rows, len(self))
        lengths = np.full(count, -1, dtype=np.int64)
        first = 0
        while first < count:
            end = int(np.searchsorted(self._offsets, self._offsets[first] + _BLOCK, side="right")) - 1
            last = min(max(end, first + 1), count)
            places, row = self._markers(first, last)
            lengths[row] = places - self._offsets[row]
            first = last
        if (empty := np.flatnonzero(lengths == 0)).size:
            raise UserError(f"{self.bin_path}, row {empty[0]}: it has no token before its marker: {REMEDY}")
        return lengths

    def _markers(self, first: int, last: int) -> tuple[Ids, Ids]:
        """Check rows first..last-1, and return the places of their markers in the file, and their rows."""
        start = self._offsets[first]
        tokens = self._tokens[start : self._offsets[last]]
        is_marker = tokens == self.marker
        places = np.flatnonzero(is_marker) + start
        rows = self._row_of(places)
        if (repeated := np.flatnonzero(rows[1:] == rows[:-1])).size:
            raise UserError(f"{self.bin_path}, row {rows[repeated[0]]}: it has more than one marker: {REMEDY}")
        if self.vocab_size is not None:
            outside = ((tokens >= self.vocab_size) & ~is_marker) | (tokens < 0)
            if outside.any():
                place = int(np.argmax(outside))
                raise UserError(
                    f"{self.bin_path}, row {self._row_of(start + place)}: token {tokens[place]} is outside the "
                    f"vocabulary of {self.vocab_size} tokens: process the data with this model's tokenizer"
                )
        return places, rows

    def _row_of(self, places: Any) -> Any:
        return np.searchsorted(self._offsets, places, side="right") - 1


def _file_size(path: Path) -> int:
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file: {REMEDY}")
    return path.stat().st_size


def _read_index(path: Path, bin_size: int) -> tuple[np.dtype[Any], Ids]:
    """Return the dtype, and the place of each row's first token and of the end, `(rows + 1,)`, all checked."""
    size = _file_size(path)
    with open(path, "rb") as file:
        dtype, rows, documents = _read_header(path, file.read(HEADER.size), size, bin_size)
        sizes = np.frombuffer(file.read(4 * rows), dtype="<i4")
        pointers = np.frombuffer(file.read(8 * rows), dtype="<i8")
        starts = np.frombuffer(file.read(8 * documents), dtype="<i8")
    if (empty := np.flatnonzero(sizes < 1)).size:
        raise UserError(f"{path}, row {empty[0]}: {sizes[empty[0]]} tokens is not a length: {REMEDY}")
    total = int(sizes.sum(dtype=np.int64)) * dtype.itemsize
    if total != bin_size:
        raise UserError(f"{path}: its rows fill {total} bytes, the .bin beside it has {bin_size}: {REMEDY}")
    offsets = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(sizes, out=offsets[1:])
    if (wrong := np.flatnonzero(pointers != offsets[:-1] * dtype.itemsize)).size:
        raise UserError(f"{path}, row {wrong[0]}: it does not begin where the row before it ends: {REMEDY}")
    if starts.min() < 0 or starts.max() > rows:
        raise UserError(f"{path}: its documents begin outside its {rows} rows: {REMEDY}")
    return dtype, offsets


def _read_header(path: Path, head: bytes, size: int, bin_size: int) -> tuple[np.dtype[Any], int, int]:
    """Return (dtype, rows, documents). Python ints cannot overflow, and a claimed size allocates nothing."""
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise UserError(f"{path}: this is not a token index: {REMEDY}")
    _, version, code, rows, documents = HEADER.unpack(head)
    if version != VERSION:
        raise UserError(f"{path}: version {version} of the format is unknown, only {VERSION}: {REMEDY}")
    if code not in DTYPES:
        raise UserError(f"{path}: dtype code {code} is unknown, only 8 (uint16) and 4 (int32): {REMEDY}")
    wanted = HEADER.size + 12 * rows + 8 * documents
    if wanted != size:
        raise UserError(f"{path}: {rows} rows need {wanted} bytes, it has {size}: it is damaged, {REMEDY}")
    if rows == 0 or documents == 0:
        raise UserError(f"{path}: it holds no rows: {REMEDY}")
    if rows * DTYPES[code].itemsize > bin_size:
        raise UserError(f"{path}: {rows} rows do not fit in the {bin_size} bytes of the .bin beside it: {REMEDY}")
    return DTYPES[code], rows, documents


class TokenFileWriter:
    """Appends rows to an open token file. `write_token_file` makes one."""

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any]) -> None:
        self.file, self.dtype = file, np.dtype(dtype)
        self.sizes: list[int] = []

    def add(self, row: Sequence[int] | Ids) -> None:
        """Append one row of token ids, with its marker if it has one. Raise ValueError if they do not fit the dtype."""
        ids = np.asarray(row)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(f"a row is a list of at least one token id, not {ids.dtype} {ids.shape}")
        if ids.min() < 0 or ids.max() > marker_of(self.dtype):
            raise ValueError(f"token ids {ids.min()}..{ids.max()} do not fit {self.dtype}")
        self.file.write(ids.astype(self.dtype).tobytes())
        self.sizes.append(ids.size)

    def index(self) -> bytes:
        """Return the content of the .idx file."""
        sizes = np.asarray(self.sizes, dtype="<i4")
        ends = np.cumsum(sizes, dtype="<i8") * self.dtype.itemsize
        pointers = np.concatenate([[0], ends[:-1]]).astype("<i8")[: len(sizes)]
        head = HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(sizes), 1)
        return head + sizes.tobytes() + pointers.tobytes() + np.zeros(1, dtype="<i8").tobytes()


@contextlib.contextmanager
def write_token_file(path_prefix: str | Path, dtype: np.dtype[Any]) -> Iterator[TokenFileWriter]:
    """Write `<path_prefix>.bin` and `.idx`, which appear on leaving the `with` block.

    After an error nothing is left behind, and files of that name stay unchanged.

    Args:
        path_prefix: The path without its ending.
        dtype: See `token_dtype`.

    Raises:
        UserError: No row was added, or the files cannot be written.
    """
    if np.dtype(dtype) not in CODES:
        raise ValueError(f"token files hold uint16 or int32, not {dtype}")
    prefix = Path(path_prefix)
    with atomic_files(prefix.parent) as folder:
        with open(folder / f"{prefix.name}.bin", "wb") as file:
            writer = TokenFileWriter(file, dtype)
            yield writer
        if not writer.sizes:
            raise UserError(f"{prefix}.bin: there is no row to write")
        (folder / f"{prefix.name}.idx").write_bytes(writer.index())
