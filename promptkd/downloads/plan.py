"""Plan the download of one item: which files of its repository, which of them exist already, how much disk space."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from promptkd.downloads.catalog import Item, has_size, read_manifest
from promptkd.downloads.conversion import safetensors_name
from promptkd.downloads.hub import HubError, Listing, RemoteFile, list_files

TEXT = (".json", ".jsonl", ".txt", ".md")
BARE = ("LICENSE", "LICENCE", "NOTICE", "tokenizer.model")
# In order of preference: (one file, the index of several files, their names).
WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json", r"model-\d{5}-of-(\d{5})\.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", r"pytorch_model-\d{5}-of-(\d{5})\.bin"),
)


@dataclass(frozen=True)
class Plan:
    """One item to be completed."""

    item: Item
    folder: Path  # the final place
    staging: Path  # where files are collected until all are complete
    listing: Listing
    files: dict[str, RemoteFile]  # by the name relative to the item's folder
    existing: set[str]  # names that are already in `folder`

    @property
    def pickles(self) -> list[str]:
        """The weight files to convert to safetensors. The .bin files of a data set are token files and stay."""
        return sorted(name for name in self.files if self.item.kind == "model" and name.endswith(".bin"))

    @property
    def outputs(self) -> dict[str, str]:
        """The pickle files and their index -> the safetensors files and index that replace them."""
        indices = self.files.keys() & {WEIGHTS[-1][1]}
        return {name: safetensors_name(name) for name in [*self.pickles, *indices]}

    def find(self, name: str) -> Path:
        """Return the path of a complete file."""
        return self.folder / name if name in self.existing else self.staging / self.files[name].path

    def missing_bytes(self) -> int:
        """Return the bytes still to be downloaded, or the catalog's estimate if the hub gives no sizes."""
        sizes = {name: file.size for name, file in self.files.items()}
        if None in sizes.values():
            return self.item.size or 0
        return sum(size for name, size in sizes.items() if size and not has_size(self.find(name), size))

    def conversion_bytes(self) -> int:
        """Return the bytes of the safetensors files, which exist together with the pickle files for a while."""
        sizes = [self.files[name].size for name in self.pickles]
        return (self.item.size or 0) if None in sizes else sum(size or 0 for size in sizes)


def make_plan(item: Item, base: Path) -> Plan:
    """List an item's repository and choose its files. Write nothing.

    Args:
        item: A row of the catalog that has a repository.
        base: The folder that holds all items.

    Raises:
        HubError: If the item cannot be downloaded, or its folder holds other files of the same names.
    """
    assert item.repo is not None
    listing = list_files(item.repo, item.kind)
    files = _model_files(item, listing) if item.kind == "model" else _data_files(item, listing)
    folder = item.folder(base)
    plan = Plan(item, folder, item.staging(base), listing, files, set())
    replaceable = read_manifest(folder) or {}  # files of an earlier download
    for name in [*files, *plan.outputs.values()]:
        if name in files and files[name].is_at(folder / name):
            plan.existing.add(name)
        elif (folder / name).exists() and name not in replaceable:
            raise HubError(f"{item.target} holds another {name} than {item.repo}: move that folder away first")
    return plan


def _model_files(item: Item, listing: Listing) -> dict[str, RemoteFile]:
    """Choose weights in one format, configuration, tokenizer and texts. Leave out code and subfolders."""
    top = {file.path: file for file in listing.files if "/" not in file.path and not file.path.startswith(".")}
    if "config.json" not in top:
        raise HubError(f"{item.repo} has no config.json: it is not a transformers model")
    chosen = {name for name in top if (name.endswith(TEXT) or name in BARE) and not name.endswith(".index.json")}
    return {name: top[name] for name in sorted(chosen | _weights(item, top))}


def _weights(item: Item, top: dict[str, RemoteFile]) -> set[str]:
    for single, index, pattern in WEIGHTS:
        if single in top:
            return {single}
        if index in top:
            parts = {name: int(match[1]) for name in top if (match := re.fullmatch(pattern, name))}
            if set(parts.values()) != {len(parts)}:
                raise HubError(f"{item.repo} has {len(parts)} of the weight files that their names announce")
            return {index, *parts}
    raise HubError(f"{item.repo} has no model.safetensors and no pytorch_model.bin")


def _data_files(item: Item, listing: Listing) -> dict[str, RemoteFile]:
    """Choose texts, and token files as pairs of .bin and .idx, below the item's subfolder if it has one."""
    prefix = f"{item.subfolder}/" if item.subfolder else ""
    inside = {file.path.removeprefix(prefix): file for file in listing.files if file.path.startswith(prefix)}
    visible = {name: file for name, file in inside.items() if not any(p.startswith(".") for p in name.split("/"))}
    chosen = {
        name: file
        for name, file in sorted(visible.items())
        if name.endswith(TEXT)
        or name.rpartition("/")[2] in BARE
        or (name.endswith((".bin", ".idx")) and {name[:-4] + ".bin", name[:-4] + ".idx"} <= visible.keys())
    }
    if absent := [name for name in item.needs if name not in chosen]:
        raise HubError(f"{item.repo} has no {prefix}{absent[0]}, which the scripts read")
    if not chosen:
        raise HubError(f"{item.repo} has nothing to read{f' in {prefix}' if prefix else ''}")
    return chosen
