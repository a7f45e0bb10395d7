"""Files of rows: JSON Lines, a JSON array, CSV with a header, Parquet, and what the `datasets` library knows.

A split is looked for under the names of `SPLITS`, the first one first, with each ending of `KINDS`. Data sets of the
`datasets` library (a folder that its `save_to_disk` wrote, or `hub:NAME`) need that library; see `saved_rows`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from promptkd.data.reading import say
from promptkd.data.saved_rows import HUB, SPLIT, is_saved, is_source, open_saved, read_saved
from promptkd.errors import UserError
from promptkd.utils.jsonl import decode, json_lines, numbered_lines, parse_line
from promptkd.utils.strict_json import parse_json

KINDS = (".jsonl", ".json", ".csv", ".parquet")
# Split -> the names it may have. A folder's test split is its dev set only where it has no other.
SPLITS = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev", "test"),
    "test": ("valid", "test", "validation", "val", "dev"),  # what evaluate.py asks; published test sets are valid.jsonl
}
LARGEST = 1 << 32  # bytes of a JSON array, which is read in one piece
LONGEST_FIELD = 1 << 26  # characters of a CSV field
Rows = Iterator[tuple[str, dict[str, Any]]]  # file and place, row


def read_rows(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """All rows of a source, each with the file and place that errors name. See `iterate_rows`."""
    rows = list(iterate_rows(path))
    if not rows:
        raise UserError(f"{path}: the file is empty: it needs one JSON object per line")
    return rows


def iterate_rows(path: str | Path) -> Rows:
    """The rows of a file by its kind, or of one split of a saved data set: FOLDER#SPLIT, hub:NAME#SPLIT.

    Raises:
        UserError: It cannot be read, names the file and the place, and says what to do.
    """
    if is_source(path):
        yield from read_saved(path)
    elif Path(path).suffix == ".csv":
        yield from _csv_rows(path)
    elif Path(path).suffix == ".parquet":
        yield from _parquet_rows(path)
    elif _begins_array(path):
        yield from _array_rows(path)
    else:
        yield from ((where, parse_line(line, where)) for where, line in lines_of(path))


def is_lines(path: str | Path) -> bool:
    """Whether a source is a file of JSON Lines."""
    return not (is_source(path) or Path(path).suffix in (".csv", ".parquet") or _begins_array(path))


def lines_of(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a file of JSON Lines, each with the file and place that errors name."""
    return ((f"{path}, line {number}", line) for number, line in json_lines(path))


def find_rows(folder: str | Path, split: str) -> str | None:
    """The source of a split's rows: a file in `folder`, a split of a saved data set, or of `hub:NAME`.

    A line on stderr says which it is where another name or kind of it is there, too, or where the test split is all
    there is. Files of other kinds are no sources; `named_files` names them.
    """
    if is_hub(folder) or is_saved(folder):
        there = open_saved(str(folder))
        sources = {f"{folder}{SPLIT}{name}": name for name in SPLITS[split] if name in there}
    else:
        places = {Path(folder) / f"{name}{kind}": name for name in SPLITS[split] for kind in KINDS}
        sources = {str(place): name for place, name in places.items() if os.path.lexists(place)}
    if not sources:
        return None
    source, used = next(iter(sources.items()))
    apart = "test" if split == "valid" else None  # that a folder has both is no question
    rivals = [os.path.basename(other) for other, name in sources.items() if other != source and name != apart]
    if rivals:
        say(f"{source} is read; {', '.join(rivals)} beside it is not")
    if used == apart:
        say(f"{source} is the dev set: there is no validation split")
    return source


def digest_of_rows(source: str | Path) -> str:
    """The sha256 of a source: of a file's bytes, of the rows of a saved data set."""
    if not is_source(source):
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for _, row in read_saved(source):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def is_hub(folder: str | Path) -> bool:
    """Whether a name is one of the hub."""
    return str(folder).startswith(HUB)


def is_folder(folder: str | Path) -> bool:
    """Whether splits can be looked for there."""
    return is_hub(folder) or os.path.isdir(folder)


def named_files(folder: str | Path) -> str:
    """What a folder holds that might be meant as data, for an error about what it lacks."""
    if is_hub(folder) or is_saved(folder):
        return f"the splits {', '.join(open_saved(str(folder)))}"
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except OSError:
        return ""
    stems = {name for split in SPLITS.values() for name in split}
    meant = [name for name in names if re.split(r"[._-]", name)[0] in stems or Path(name).suffix in KINDS]
    return ", ".join(meant[:5])


def _begins_array(path: str | Path) -> bool:
    """Whether the first character of a file is that of a JSON array."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _array_rows(path: str | Path) -> Rows:
    size = os.path.getsize(path)
    if size > LARGEST:
        raise UserError(f"{path}, line 1: a JSON array over {LARGEST} bytes: save it as JSON Lines, one object a line")
    with open(path, "rb") as file:
        text = decode(file.read().removeprefix(b"\xef\xbb\xbf"), f"{path}")
    try:
        rows = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}, line 1: this is no JSON array ({error}): it needs an object for each row") from None
    if not rows:
        raise UserError(f"{path}, line 1: the array is empty: it needs an object for each row")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: a JSON object is needed, not {type(row).__name__}")
        yield f"{path}, row {number}", row


def _csv_rows(path: str | Path) -> Rows:
    """Rows of CSV with a header. A quoted field may hold newlines; a row is named by the line it begins on."""
    text = io.StringIO("".join(decode(line, f"{path}, line {n}") for n, line in numbered_lines(path)), newline="")
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        lines = csv.reader(text, strict=True)
        header, begin = next(lines, []), lines.line_num
        _check_header(header, path)
        for values in lines:
            where, begin = f"{path}, line {begin + 1}", lines.line_num
            if values and len(values) != len(header):
                raise UserError(f"{where}: it has {len(values)} fields, the header {len(header)}: quote or correct it")
            if values:
                yield where, dict(zip(header, values))
    except csv.Error as error:
        raise UserError(f"{path}, line {begin + 1}: this is no CSV ({error}): quote or correct it") from None
    finally:
        csv.field_size_limit(before)


def _check_header(header: list[str], path: str | Path) -> None:
    if not header:
        raise UserError(f"{path}: the file is empty: it needs a header and a line for each row")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}, line 1: the header has {twice!r} twice: give each column its own name")


def _parquet_rows(path: str | Path) -> Rows:
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file: correct the path")
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: to read Parquet, run: pip install datasets (or save the rows as .jsonl)") from None
    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
    except (ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: no readable Parquet file ({error}): write it again, or save it as .jsonl") from None
