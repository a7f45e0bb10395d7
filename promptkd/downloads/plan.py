"""What one item needs: which files of its repository, which of them are here already, how much disk."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from promptkd.downloads.hub import Hub, HubError, Listing, LocalCache, RemoteFile, part_path
from promptkd.downloads.safe_weights import output_names
from promptkd.downloads.table import Item, read_manifest

TEXT = (".json", ".jsonl", ".txt", ".md")
BARE = ("LICENSE", "LICENCE", "NOTICE", "tokenizer.model")
# In the order of preference: the whole weights, or an index and its numbered parts.
WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json", r"model-\d{5}-of-(\d{5})\.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", r"pytorch_model-\d{5}-of-(\d{5})\.bin"),
)


@dataclass(frozen=True)
class Plan:
    """One item that is to be made complete. Names are relative to its folder."""

    item: Item
    folder: Path  # where the files go in the end
    staging: Path  # where they are gathered
    listing: Listing
    files: dict[str, RemoteFile]
    here: set[str] = field(default_factory=set)  # already in the folder, put there by hand or by an earlier run

    @property
    def pickles(self) -> list[str]:
        """The weights that become safetensors. A data set's .bin files are token files and stay."""
        return sorted(name for name in self.files if self.item.kind == "model" and name.endswith(".bin"))

    def find(self, name: str) -> Path:
        """Where a fetched file is."""
        return (self.folder if name in self.here else self.staging) / name

    def missing_bytes(self) -> int:
        """What is still to be written for the files; the table's figure where the hub gives no sizes."""
        if any(file.size is None for file in self.files.values()):
            return self.item.size or 0
        return sum(file.size - self._has(name, file) for name, file in self.files.items())

    def conversion_bytes(self) -> int:
        """Room for the safetensors while the pickle files are still there."""
        sizes = [self.files[name].size for name in self.pickles]
        return (self.item.size or 0) if None in sizes else sum(sizes)

    def _has(self, name: str, file: RemoteFile) -> int:
        if name in self.here:
            return file.size
        staged = self.staging / name
        places = [path for path in (staged, part_path(staged, file)) if path.is_file()]
        return min(file.size, places[0].stat().st_size) if places else 0


def make_plan(item: Item, base: Path, source: Hub | LocalCache) -> Plan:
    """Ask for the repository's files and choose. Writes nothing. Raises HubError."""
    listing = source.listing(item.repo, item.kind)
    files = _model_files(item, listing) if item.kind == "model" else _data_files(item, listing)
    plan = Plan(item, item.folder(base), item.staging(base), listing, files)
    ours = read_manifest(plan.folder) or {}  # what an earlier run put there may be replaced
    outputs = output_names(len(plan.pickles)) if plan.pickles else []
    for name in [*files, *outputs]:
        path = plan.folder / name
        if name in files and files[name].is_at(path):
            plan.here.add(name)
        elif path.exists() and name not in ours:
            raise HubError(f"{item.target} holds another {name} than {item.repo}: move that folder away first")
    return plan


def _model_files(item: Item, listing: Listing) -> dict[str, RemoteFile]:
    """Weights in one form, configuration, tokenizer and texts; no code, no other framework, no subfolders."""
    top = {file.path: file for file in listing.files if "/" not in file.path and not file.path.startswith(".")}
    if "config.json" not in top:
        raise HubError(f"{item.repo} has no config.json: it is not a model of transformers")
    chosen = {name for name in top if (name.endswith(TEXT) or name in BARE) and not name.endswith(".index.json")}
    return {name: top[name] for name in sorted(chosen | _weights(item, top))}


def _weights(item: Item, top: dict[str, RemoteFile]) -> set[str]:
    for whole, index, pattern in WEIGHTS:
        if whole in top:
            return {whole}
        if index in top:
            parts = {name: int(match[1]) for name in top if (match := re.fullmatch(pattern, name))}
            if set(parts.values()) != {len(parts)}:
                raise HubError(f"{item.repo} has {len(parts)} of the weight files that their names announce")
            return {index, *parts}
    raise HubError(f"{item.repo} has no model.safetensors and no pytorch_model.bin")


def _data_files(item: Item, listing: Listing) -> dict[str, RemoteFile]:
    """Texts, and token files as pairs of .bin and .idx; below the item's subfolder if it has one."""
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
