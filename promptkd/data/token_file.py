"""The published token files: `<name>.bin` holds all rows' ids end to end, `<name>.idx` says where each row lies.

The index, little-endian throughout:

    magic "MMIDIDX" 0 0 | uint64 version 1 | uint8 dtype code | uint64 rows | uint64 documents
    int32 tokens of each row | int64 byte offset of each row | int64 first row of each document

A row is prompt, marker, response; the marker is the largest number of the dtype, no token has it. A row
without a marker is plain text. Nothing in a file is believed before it was checked.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from operator import index as as_int
from pathlib import Path

import numpy as np

from promptkd.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LARGEST_UINT16_VOCABULARY = 65_500
REMEDY = "make it anew with tools/process_data.py"
_BLOCK = 1 << 22  # tokens looked at together: bounds memory, whatever the file's size


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest dtype of the format that holds `vocab_size` token ids and a marker."""
    return DTYPES[8] if vocab_size <= LARGEST_UINT16_VOCABULARY else DTYPES[4]


def marker_of(dtype: np.dtype) -> int:
    """What stands between prompt and response: 65535 for uint16, 2147483647 for int32."""
    return int(np.iinfo(dtype).max)


def join_row(prompt: Sequence[int], response: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """One row of a token file, int64: prompt, marker, response."""
    return np.concatenate([np.asarray(part, np.int64) for part in (prompt, [marker_of(dtype)], response)])


def split_row(row: np.ndarray, marker: int) -> tuple[np.ndarray, np.ndarray]:
    """(prompt, response) of a row; without a marker the first token is the prompt, the others the response."""
    places = np.flatnonzero(row == marker)
    if len(places) > 1:
        raise UserError(f"a row has {len(places)} markers ({marker}) between prompt and response: {REMEDY}")
    if len(places) == 0:
        return row[:1], row[1:]
    return row[: places[0]], row[places[0] + 1 :]


class TokenFile:
    """Rows of token ids, memory-mapped: `len(file)`, `file[i]` -> int64 [tokens], marker included.

    Opening checks the index against both files' sizes; reading a row checks its ids against `vocab_size`
    (None: not checked) and that it has at most one marker. All errors are UserError and name the file.
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

    def __getitem__(self, index: int) -> np.ndarray:
        row = as_int(index)
        if not 0 <= row < len(self):
            raise IndexError(f"{self.bin_path}: row {row} of {len(self)}")
        self._markers(row, row + 1)
        return self._tokens[self._offsets[row] : self._offsets[row + 1]].astype(np.int64)

    def row_lengths(self) -> np.ndarray:
        """Tokens of each row, marker included: int64 [rows]."""
        return np.diff(self._offsets)

    def prompt_lengths(self, rows: int | None = None) -> np.ndarray:
        """Tokens before the marker in each of the first `rows` rows, -1 where there is none: int64 [rows].

        Reads and checks all tokens of these rows on the way, so that a bad one is known before a run begins.
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

    def _markers(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """(places in the file, their rows) of the markers in rows first..last-1, all of them checked."""
        start = self._offsets[first]
        tokens = self._tokens[start : self._offsets[last]]
        is_marker = tokens == self.marker
        places = np.flatnonzero(is_marker) + start
        rows = self._row_of(places)
        if (twice := np.flatnonzero(rows[1:] == rows[:-1])).size:
            raise UserError(f"{self.bin_path}, row {rows[twice[0]]}: it has more than one marker: {REMEDY}")
        if self.vocab_size is not None:
            outside = ((tokens >= self.vocab_size) & ~is_marker) | (tokens < 0)
            if outside.any():
                place = int(np.argmax(outside))
                raise UserError(
                    f"{self.bin_path}, row {self._row_of(start + place)}: token {tokens[place]} is outside the "
                    f"vocabulary of {self.vocab_size} tokens: process the data with this model's tokenizer"
                )
        return places, rows

    def _row_of(self, places: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._offsets, places, side="right") - 1


def _file_size(path: Path) -> int:
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file: {REMEDY}")
    return path.stat().st_size


def _read_index(path: Path, bin_size: int) -> tuple[np.dtype, np.ndarray]:
    """(dtype, place of each row's first token and of the end: int64 [rows + 1]), checked against both sizes."""
    size = _file_size(path)
    with open(path, "rb") as file:
        dtype, rows, documents = _read_header(path, file.read(HEADER.size), size, bin_size)
        sizes = np.frombuffer(file.read(4 * rows), dtype="<i4")
        pointers = np.frombuffer(file.read(8 * rows), dtype="<i8")
        starts = np.frombuffer(file.read(8 * documents), dtype="<i8")
    if (empty := np.flatnonzero(sizes < 1)).size:
        raise UserError(f"{path}, row {empty[0]}: {sizes[empty[0]]} tokens is no length: {REMEDY}")
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


def _read_header(path: Path, head: bytes, size: int, bin_size: int) -> tuple[np.dtype, int, int]:
    """(dtype, rows, documents). All are Python ints: nothing overflows, nothing of a claimed size is allocated."""
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise UserError(f"{path}: this is no token index: {REMEDY}")
    _, version, code, rows, documents = HEADER.unpack(head)
    if version != VERSION:
        raise UserError(f"{path}: version {version} of the format is not known, only {VERSION}: {REMEDY}")
    if code not in DTYPES:
        raise UserError(f"{path}: dtype code {code} is not known, only 8 (uint16) and 4 (int32): {REMEDY}")
    wanted = HEADER.size + 12 * rows + 8 * documents
    if wanted != size:
        raise UserError(f"{path}: {rows} rows need {wanted} bytes, it has {size}: it is damaged, {REMEDY}")
    if rows == 0 or documents == 0:
        raise UserError(f"{path}: it holds no rows: {REMEDY}")
    if rows * DTYPES[code].itemsize > bin_size:
        raise UserError(f"{path}: {rows} rows cannot lie in the {bin_size} bytes of the .bin beside it: {REMEDY}")
    return DTYPES[code], rows, documents


class TokenFileWriter:
    """Writes a token file under temporary names; it gets its own on leaving the `with` block without error.

    Otherwise nothing is left behind, and a file that was there before stays as it was.
    """

    def __init__(self, path_prefix: str | Path, dtype: np.dtype) -> None:
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODES:
            raise ValueError(f"token files hold uint16 or int32, not {self.dtype}")
        self._final = [Path(f"{path_prefix}{end}") for end in (".bin", ".idx")]
        self._temporary = [path.with_name(f".{path.name}.{os.getpid()}") for path in self._final]
        self._sizes: list[int] = []

    def __enter__(self) -> TokenFileWriter:
        self._bin = open(self._temporary[0], "wb")
        return self

    def add(self, row: Sequence[int] | np.ndarray) -> None:
        """Append one row of token ids (marker included, if any); ValueError when the dtype cannot hold it."""
        ids = np.asarray(row)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(f"a row is a list of at least one token id, not {ids.dtype} {ids.shape}")
        if ids.min() < 0 or ids.max() > marker_of(self.dtype):
            raise ValueError(f"token ids {ids.min()}..{ids.max()} do not fit {self.dtype}")
        self._bin.write(ids.astype(self.dtype).tobytes())
        self._sizes.append(ids.size)

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        try:
            if kind is None:
                if not self._sizes:
                    raise UserError(f"{self._final[0]}: there is no row to write")
                _sync(self._bin)
                with open(self._temporary[1], "wb") as idx:
                    idx.write(self._index())
                    _sync(idx)
            self._bin.close()
            if kind is None:
                for temporary, final in zip(self._temporary, self._final):
                    os.replace(temporary, final)
        finally:
            self._bin.close()
            for temporary in self._temporary:
                temporary.unlink(missing_ok=True)

    def _index(self) -> bytes:
        sizes = np.asarray(self._sizes, dtype="<i4")
        ends = np.cumsum(sizes, dtype="<i8") * self.dtype.itemsize
        pointers = np.concatenate([[0], ends[:-1]]).astype("<i8")[: len(sizes)]
        head = HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(sizes), 1)
        return head + sizes.tobytes() + pointers.tobytes() + np.zeros(1, dtype="<i8").tobytes()


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
