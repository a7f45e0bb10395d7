"""Checks of a model's folder before transformers reads it: valid JSON, safe file names, plausible sizes."""

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
LARGEST_TEXT = 1 << 27  # bytes, four times the largest vocabularies
# Size -> its field names in the config.json of all families.
SIZES = {size: field_names(size) for size in ("layers", "hidden", "heads", "vocab", "positions")}
SIZES["labels"] = ("num_labels",)
MOST_LABELS = 1 << 20  # transformers creates a name for each label of any model


def looks_local(name: str) -> bool:
    """Whether the name is a path and not the name of a model on the hub."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


def hub_advice(name: str) -> str:
    """Return the end of an error: how to get a model that the hub did not provide. Empty for a local path."""
    if looks_local(name) or os.path.isdir(name):
        return ""
    alternative = "name a folder that holds its files"
    for item in load_catalog(DOWNLOADS):
        if item.repo == name:
            alternative = f"run bash download_requirements.sh --only {item.key} and name {item.target}"
    return f"; for the hub set HF_ENDPOINT to a mirror or HTTPS_PROXY to your proxy; or {alternative}"


def check_files(folder: Path, remedy: str) -> None:
    """Raise UserError for pipes and devices, which would block a loader, and for text files that would fill memory."""
    for path in sorted(folder.iterdir()):
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: neither a file nor a folder: {remedy}")
        if path.is_file() and path.suffix in TEXTS and (size := path.stat().st_size) > LARGEST_TEXT:
            raise UserError(f"{path}: {size} bytes are too many for a {path.suffix} file: {remedy}")


def check_model_folder(folder: Path, option: str) -> None:
    """Check everything in a model's folder except the numbers in its weights.

    Args:
        folder: The folder.
        option: The option that gave the folder, for error messages.

    Raises:
        UserError: If a loader would fail late, run out of memory, load code or leave the folder.
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
                f"remove the key, or set it to {' or '.join(IMPLEMENTATIONS)}"
            )
    if "quantization_config" in config:
        raise UserError(f"{option} {folder}: quantized weights are not supported: name a folder with unquantized ones")
    if isinstance(config.get("text_config"), dict):  # the sizes of a model of text and images
        config = {**config["text_config"], **config}
    sizes = {size: _size(config, names, folder, option) for size, names in SIZES.items()}
    if sizes["labels"] > MOST_LABELS:
        raise UserError(f"{option} {folder}: config.json has {sizes['labels']} labels: remove num_labels")
    stored = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    # Every layer has at least a square matrix of its width, and a number takes at least a byte.
    claimed = sizes["layers"] * sizes["hidden"] ** 2 + sizes["vocab"] * sizes["hidden"]
    if claimed > stored > 0:
        raise UserError(
            f"{option} {folder}: config.json describes at least {claimed} numbers, but the weights have {stored} "
            "bytes: use the config.json and the weights of one model"
        )


def _size(config: dict[str, Any], names: tuple[str, ...], folder: Path, option: str) -> int:
    """Read a positive integer from config.json. Return 0 if none of the names is there."""
    for name in names:
        value = config.get(name)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{option} {folder}: config.json says {name} is {value!r}, not a positive integer")
            return value
    return 0


def _check_index(path: Path, remedy: str) -> None:
    """Raise UserError unless an index only names files in its own folder."""
    weight_map = read_object(path, remedy).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: the weight_map is missing: {remedy}")
    for name in dict.fromkeys(map(str, weight_map.values())):
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise UserError(f"{path}: it names {name!r}, which is not a file of that folder: {remedy}")
        if not (path.parent / name).is_file():
            raise UserError(f"{path}: it names {name}, which is missing: {remedy}")
