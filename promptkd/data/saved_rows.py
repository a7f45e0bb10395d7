"""Data sets of the `datasets` library: folders that its `save_to_disk` wrote, and names on the hub.

`hub:NAME` is a name on the hub, `hub:NAME@REVISION` one of its versions; `hub:NAME:CONFIG` one of its configurations.
The library is optional. Nothing here runs code of a data set.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from promptkd.errors import UserError

HUB = "hub:"
SPLIT = "#"  # between a source and its split
INSTALL = "run: pip install datasets"
_MARKS = ("dataset_dict.json", "dataset_info.json")


def is_saved(folder: str | Path) -> bool:
    """Whether `save_to_disk` wrote a folder: a data set with splits, or a single one."""
    return any(os.path.isfile(Path(folder) / mark) for mark in _MARKS)


def is_source(source: str | Path) -> bool:
    """Whether the library has to read it: a saved folder or `hub:NAME`, with `#SPLIT` behind it or without."""
    return str(source).startswith(HUB) or is_saved(str(source).partition(SPLIT)[0])


def read_saved(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of SOURCE#SPLIT and their places. Without a split it is `train`."""
    head, _, split = str(source).partition(SPLIT)
    split = split or "train"
    if split not in (there := open_saved(head)):
        raise UserError(f"{head}: it has no split {split!r}: name one of {', '.join(there)}, as {head}{SPLIT}NAME")
    for number, row in enumerate(there[split], 1):
        yield f"{head}{SPLIT}{split}, row {number}", dict(row)


@functools.lru_cache(maxsize=4)
def open_saved(source: str) -> Mapping[str, Any]:
    """The splits of a saved folder or of `hub:NAME`, by name. A data set without splits is called `train`.

    Raises:
        UserError: The library is not installed, or it cannot load the data set.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: to read it, {INSTALL} (or save the rows as .jsonl)") from None
    datasets.disable_progress_bars()
    try:
        if source.startswith(HUB):
            name, _, revision = source.removeprefix(HUB).partition("@")
            name, _, config = name.partition(":")
            found = datasets.load_dataset(name, config or None, revision=revision or None)
        else:
            found = datasets.load_from_disk(source)
    except Exception as error:  # the library raises a dozen kinds here
        remedy = "correct the name, or connect to the hub once" if source.startswith(HUB) else "save it again"
        raise UserError(f"{source}: the datasets library cannot load it ({error}): {remedy}") from None
    return found if isinstance(found, Mapping) else {"train": found}
