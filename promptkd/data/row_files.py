"""Sources of rows: JSON Lines, a JSON array, CSV with a header, Parquet, and data sets of the `datasets` library.

A split is searched under the names in `SPLITS`, the first one first, with each suffix in `KINDS`. The `datasets`
library is optional. It reads folders that its `save_to_disk` wrote, and names on the hub: `hub:NAME`,
`hub:NAME@REVISION` for a version, `hub:NAME:CONFIG` for a configuration. No code of a data set is run.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from promptkd.errors import UserError
from promptkd.utils.jsonl import decode, json_lines, numbered_lines, parse_line
from promptkd.utils.strict_json import parse_json

KINDS = (".jsonl", ".json", ".csv", ".parquet")
# Split -> the names it may have. The test split is the dev set only where the folder has no other.
SPLITS = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev", "test"),
    "test": ("valid", "test", "validation", "val", "dev"),  # for evaluate.py; published test sets are valid.jsonl
}
HUB = "hub:"
SPLIT = "#"  # between a data set and its split
LARGEST = 1 << 32  # bytes of a JSON array, which is read in one piece
LONGEST_FIELD = 1 << 26  # characters of a CSV field
Rows = Iterator[tuple[str, dict[str, Any]]]  # file and place, row


def say(text: str) -> None:
    """Print a line to stderr, on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def read_rows(source: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Return all rows of a source, each with the file and place that errors name. See `iterate_rows`."""
    rows = list(iterate_rows(source))
    if not rows:
        raise UserError(f"{source}: the file is empty: it needs one JSON object per line")
    return rows


def iterate_rows(source: str | Path) -> Rows:
    """Yield the rows of a file, or of one split of a data set (FOLDER#SPLIT, hub:NAME#SPLIT).

    Raises:
        UserError: The source cannot be read. The error names the file, the place and a remedy.
    """
    for where, row in iterate_raw(source):
        yield where, parse_line(row, where) if isinstance(row, bytes) else row


def iterate_raw(source: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield rows as `iterate_rows` does, but lines of JSON as bytes, which worker processes can parse."""
    if is_data_set(source):
        yield from _data_set_rows(source)
    elif Path(source).suffix == ".csv":
        yield from _csv_rows(source)
    elif Path(source).suffix == ".parquet":
        yield from _parquet_rows(source)
    elif _begins_array(source):
        yield from _array_rows(source)
    else:
        yield from ((f"{source}, line {number}", line) for number, line in json_lines(source))


def find_rows(folder: str | Path, split: str) -> str | None:
    """Find the source of a split's rows.

    A line on stderr names the source where the folder also has other files for the split, or only a test split.

    Args:
        folder: A folder of files, a saved data set, or `hub:NAME`.
        split: A key of `SPLITS`.

    Returns:
        A file or `DATA_SET#SPLIT`; None where the folder has neither. `named_files` names files of other kinds.
    """
    if _is_data_set_folder(folder):
        splits = open_data_set(str(folder))
        sources = {f"{folder}{SPLIT}{name}": name for name in SPLITS[split] if name in splits}
    else:
        files = {Path(folder) / f"{name}{kind}": name for name in SPLITS[split] for kind in KINDS}
        sources = {str(file): name for file, name in files.items() if os.path.lexists(file)}
    if not sources:
        return None
    source, used = next(iter(sources.items()))
    test = "test" if split == "valid" else None  # a validation and a test split side by side are normal
    rivals = [os.path.basename(other) for other, name in sources.items() if other != source and name != test]
    if rivals:
        say(f"{source} is read; {', '.join(rivals)} beside it is not")
    if used == test:
        say(f"{source} is the dev set: there is no validation split")
    return source


def digest_of_rows(source: str | Path) -> str:
    """Return the sha256 of a file's bytes, or of a data set's rows."""
    if not is_data_set(source):
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for _, row in _data_set_rows(source):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def is_hub(folder: str | Path) -> bool:
    """Return whether a name is a data set on the hub."""
    return str(folder).startswith(HUB)


def is_folder(folder: str | Path) -> bool:
    """Return whether a name can have splits: a folder, or a data set on the hub."""
    return is_hub(folder) or os.path.isdir(folder)


def is_data_set(source: str | Path) -> bool:
    """Return whether the `datasets` library reads a source, with `#SPLIT` or without."""
    return _is_data_set_folder(str(source).partition(SPLIT)[0])


def named_files(folder: str | Path) -> str:
    """Name what a folder holds that may be meant as data, for an error about a missing split."""
    if _is_data_set_folder(folder):
        return f"the splits {', '.join(open_data_set(str(folder)))}"
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except OSError:
        return ""
    stems = {name for split in SPLITS.values() for name in split}
    meant = [name for name in names if re.split(r"[._-]", name)[0] in stems or Path(name).suffix in KINDS]
    return ", ".join(meant[:5])


@functools.lru_cache(maxsize=4)
def open_data_set(name: str) -> Mapping[str, Any]:
    """Return the splits of a saved folder or of `hub:NAME`, by name. A data set without splits is called `train`.

    Raises:
        UserError: The library is not installed, or it cannot load the data set.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: to read it, run: pip install datasets (or save the rows as .jsonl)") from None
    datasets.disable_progress_bars()
    try:
        if is_hub(name):
            path, _, revision = name.removeprefix(HUB).partition("@")
            path, _, config = path.partition(":")
            loaded = datasets.load_dataset(path, config or None, revision=revision or None)
        else:
            loaded = datasets.load_from_disk(name)
    except Exception as error:  # the library raises a dozen kinds here
        remedy = "correct the name, or connect to the hub once" if is_hub(name) else "save it again"
        raise UserError(f"{name}: the datasets library cannot load it ({error}): {remedy}") from None
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def _is_data_set_folder(folder: str | Path) -> bool:
    """Return whether a name is on the hub, or `save_to_disk` wrote the folder (with splits or without)."""
    names = ("dataset_dict.json", "dataset_info.json")
    return is_hub(folder) or any(os.path.isfile(Path(folder) / name) for name in names)


def _data_set_rows(source: str | Path) -> Rows:
    """Yield the rows of DATA_SET#SPLIT. The default split is `train`."""
    name, _, split = str(source).partition(SPLIT)
    split = split or "train"
    if split not in (splits := open_data_set(name)):
        raise UserError(f"{name}: it has no split {split!r}: name one of {', '.join(splits)}, as {name}{SPLIT}NAME")
    for number, row in enumerate(splits[split], 1):
        yield f"{name}{SPLIT}{split}, row {number}", dict(row)


def _begins_array(path: str | Path) -> bool:
    """Return whether the first character of a file is that of a JSON array."""
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
        raise UserError(f"{path}, line 1: not a JSON array ({error}): it needs an object for each row") from None
    if not rows:
        raise UserError(f"{path}, line 1: the array is empty: it needs an object for each row")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: a JSON object is needed, not {type(row).__name__}")
        yield f"{path}, row {number}", row


def _csv_rows(path: str | Path) -> Rows:
    """Yield the rows of CSV with a header. Quoted fields may hold newlines; a row is named by its first line."""
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
        raise UserError(f"{path}, line {begin + 1}: not CSV ({error}): quote or correct it") from None
    finally:
        csv.field_size_limit(before)


def _check_header(header: list[str], path: str | Path) -> None:
    if not header:
        raise UserError(f"{path}: the file is empty: it needs a header and a line for each row")
    duplicate = next((name for name in header if header.count(name) > 1), None)
    if duplicate is not None:
        raise UserError(f"{path}, line 1: the header has {duplicate!r} twice: give each column its own name")


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
        raise UserError(
            f"{path}: not a readable Parquet file ({error}): write it again, or save it as .jsonl"
        ) from None
