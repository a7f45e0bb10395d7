"""A model's folder, looked at before transformers reads it: JSON that is sound, names that stay, sizes that can be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from promptkd.downloads.catalog import load_catalog
from promptkd.errors import UserError
from promptkd.utils.project import CONFIGS
from promptkd.utils.strict_json import read_object
from promptkd.weights.families import field_names

DOWNLOADS = CONFIGS / "downloads.json"
SETTINGS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
IMPLEMENTATIONS = ("eager", "sdpa")
TEXTS = (".json", ".txt", ".jinja", ".model")
LARGEST_TEXT = 1 << 27  # bytes; the largest vocabularies have a quarter of that
# Size -> its names in the config.json of the families.
SIZES = {size: field_names(size) for size in ("layers", "hidden", "heads", "vocab", "positions")}
SIZES["labels"] = ("num_labels",)
MOST_LABELS = 1 << 20  # transformers makes a name for each, whether a model classifies or not


def looks_local(name: str) -> bool:
    """Whether it is a path, and no name of a model on the hub."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


def hub_advice(name: str) -> str:
    """How to come by a model that the hub did not give, to end an error; "" where the name is a folder's."""
    if looks_local(name) or os.path.isdir(name):
        return ""
    way = "name a folder that holds its files"
    for item in load_catalog(DOWNLOADS):
        if item.repo == name:
            way = f"run bash download_requirements.sh --only {item.key} and name {item.target}"
    return f"; for the hub set HF_ENDPOINT to a mirror or HTTPS_PROXY to your proxy; or {way}"


def check_files(folder: Path, remedy: str) -> None:
    """No pipe or device, which a loader would read for ever; no settings or vocabulary that fill the memory."""
    for path in sorted(folder.iterdir()):
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: neither a file nor a folder: {remedy}")
        if path.is_file() and path.suffix in TEXTS and (size := path.stat().st_size) > LARGEST_TEXT:
            raise UserError(f"{path}: {size} bytes are too many for a {path.suffix} file: {remedy}")


def check_model_folder(folder: Path, option: str) -> None:
    """Raise UserError for what would make a loader fail late, take memory without end, or leave the folder.

    Weights are not read. `option` names the folder in errors.
    """
    remedy = f"{option} needs a model's folder as it was saved"
    check_files(folder, remedy)
    config = read_object(folder / "config.json", remedy)
    for name in SETTINGS:
        if (folder / name).exists():
            read_object(folder / name, remedy)
    for name in INDEXES:
        if (folder / name).exists():
            _check_index(folder / name, remedy)
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        if config.get(key) not in (None, *IMPLEMENTATIONS):
            raise UserError(
                f"{option} {folder}: config.json asks for {key} {config[key]!r}, which may be code from the hub: "
                f"take the key out, or say {' or '.join(IMPLEMENTATIONS)}"
            )
    if "quantization_config" in config:
        raise UserError(f"{option} {folder}: quantised weights are not supported: name a folder of whole ones")
    if isinstance(config.get("text_config"), dict):  # a model of text and images has its sizes there
        config = {**config["text_config"], **config}
    sizes = {size: _size(config, names, folder, option) for size, names in SIZES.items()}
    if sizes["labels"] > MOST_LABELS:
        raise UserError(f"{option} {folder}: config.json speaks of {sizes['labels']} labels: take num_labels out")
    stored = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    # Every layer has a square matrix of its width at least, and there is an embedding; no number is under a byte.
    claimed = sizes["layers"] * sizes["hidden"] ** 2 + sizes["vocab"] * sizes["hidden"]
    if claimed > stored > 0:
        raise UserError(
            f"{option} {folder}: config.json speaks of {claimed} numbers at least, the weights beside it have "
            f"{stored} bytes: one of them is another model's"
        )


def _size(config: dict[str, Any], names: tuple[str, ...], folder: Path, option: str) -> int:
    """A whole number above 0 from config.json, 0 where it has none."""
    for name in names:
        value = config.get(name)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{option} {folder}: config.json says {name} is {value!r}, no whole number above 0")
            return value
    return 0


def _check_index(path: Path, remedy: str) -> None:
    """The files that an index names are files beside it."""
    places = read_object(path, remedy).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{path}: it lacks its weight_map: {remedy}")
    for name in dict.fromkeys(map(str, places.values())):
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise UserError(f"{path}: it names {name!r}, which is no file of that folder: {remedy}")
        if not (path.parent / name).is_file():
            raise UserError(f"{path}: it names {name}, which is missing: {remedy}")
