"""Weights from PyTorch's pickle files into safetensors, which hold numbers alone and cannot run anything."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from promptkd.errors import UserError
from promptkd.strict_json import read_object
from promptkd.weights.torch_files import read_tensors

INDEX = "model.safetensors.index.json"
TIED_BY_DEFAULT = (
    "gpt2",
    "opt",
)  # families whose output head is the embedding unless config.json says otherwise


class WeightsError(Exception):
    """Why weights cannot be converted, in one line."""


def output_names(count: int) -> list[str]:
    """What `count` pickle files become, as transformers names them."""
    if count == 1:
        return ["model.safetensors"]
    return [*(f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)), INDEX]


def convert(sources: list[Path], config: Path, folder: Path) -> list[str]:
    """Write the tensors of the pickle files `sources` into `folder` and compare every byte with the source.

    One safetensors file for each source, values and dtypes unchanged; returns the names written. Reads
    through the page cache: memory stays small for files of any size. Raises WeightsError, RefusedError, OSError."""
    names = output_names(len(sources))
    tied = _is_tied(config)
    placed: dict[str, str] = {}
    total = 0
    for source, name in zip(sources, names):
        tensors = _independent(source, tied)
        if twice := placed.keys() & tensors.keys():
            raise WeightsError(f"{source.name} repeats {min(twice)}, which another file holds")
        placed |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        _write(tensors, folder / name)
        _compare(tensors, folder / name)
    if len(sources) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names


def _is_tied(config: Path) -> bool:
    try:
        settings = read_object(config, "it cannot be used")
    except UserError as error:
        raise WeightsError(str(error)) from None
    return bool(settings.get("tie_word_embeddings", settings.get("model_type") in TIED_BY_DEFAULT))


def _independent(source: Path, tied: bool) -> dict[str, torch.Tensor]:
    """The file's tensors, no two in the same memory: safetensors has no sharing.

    An output head that is the embedding is left out where the model ties the two when it loads; anything else
    that is shared is written twice, since leaving it out would leave it at random."""
    tensors = read_tensors(source, old_format=True)
    result: dict[str, torch.Tensor] = {}
    owners: dict[int, torch.Tensor] = {}
    # Heads last: of head and embedding the embedding is the one to keep.
    for name in sorted(tensors, key=_is_head):
        tensor = tensors[name]
        memory = tensor.untyped_storage().data_ptr()
        if memory not in owners:
            owners[memory] = tensor
            result[name] = tensor.contiguous()
        elif not (tied and _is_head(name) and tensor.is_set_to(owners[memory])):
            result[name] = tensor.clone(memory_format=torch.contiguous_format)
    return result


def _is_head(name: str) -> bool:
    return name.endswith("lm_head.weight")


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path.name} cannot be written: {error}") from None
    except SafetensorError as error:  # the library does not say it with an OSError
        path.unlink(missing_ok=True)
        full = "No space left" in str(error) or "os error 28" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from None
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _compare(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with safe_open(path, framework="pt") as written:
        if set(written.keys()) != set(tensors):
            raise WeightsError(f"{path.name} has other tensors than were written")
        for name, tensor in tensors.items():
            copy = written.get_tensor(name)
            same = copy.shape == tensor.shape and copy.dtype == tensor.dtype
            # Compared as bytes: a NaN is equal to itself here.
            if not same or not torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (copy, tensor))):
                raise WeightsError(f"{path.name} differs from its source in {name}: is the disk sound?")
