"""Convert PyTorch's pickle files to safetensors, which hold only tensors and cannot run code."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from promptkd.errors import UserError
from promptkd.utils.files import remove, write_json
from promptkd.utils.strict_json import read_object
from promptkd.weights.families import FAMILIES
from promptkd.weights.safetensors_io import DTYPES, SafetensorsWriter, TensorFile, have_same_bytes
from promptkd.weights.torch_files import read_tensors

INDEX = "model.safetensors.index.json"


class ConversionError(Exception):
    """Why weights cannot be converted, in one line."""


def output_names(count: int) -> list[str]:
    """Return the names of the safetensors files that replace `count` pickle files, as transformers names them."""
    if count == 1:
        return ["model.safetensors"]
    return [*(f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)), INDEX]


def convert(sources: list[Path], config: Path, folder: Path) -> list[str]:
    """Write the tensors of pickle files as safetensors files and compare every byte with the source.

    Values and dtypes are unchanged. Files are memory-mapped, so memory stays small for files of any size.

    Args:
        sources: The pickle files. Each becomes one safetensors file.
        config: The model's config.json.
        folder: The folder to write into.

    Returns:
        The names of the files written.

    Raises:
        ConversionError: If the files do not fit together, or a copy differs from its source.
        RefusedError: If a file holds anything but tensors.
    """
    names = output_names(len(sources))
    tied = _is_tied(config)
    weight_map: dict[str, str] = {}
    total = 0
    for source, name in zip(sources, names):
        tensors = _without_tied_head(read_tensors(source, legacy=True), tied)
        if repeated := weight_map.keys() & tensors.keys():
            raise ConversionError(f"{source.name} repeats {min(repeated)}, which another file holds")
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        _write(tensors, folder / name)
    if len(sources) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return names


def _is_tied(config: Path) -> bool:
    try:
        settings = read_object(config, "it cannot be used")
    except UserError as error:
        raise ConversionError(str(error)) from None
    family = FAMILIES.get(str(settings.get("model_type")))
    return family.is_tied(settings) if family else bool(settings.get("tie_word_embeddings"))


def _without_tied_head(tensors: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """Omit a head that is the embedding's memory if the model ties the two when it loads.

    Any other shared tensor is kept under each name, because an omitted one would be initialized at random.
    """
    result: dict[str, Tensor] = {}
    owners: dict[int, Tensor] = {}
    for name in sorted(tensors, key=_is_head):  # heads last, so that the embedding is the one to keep
        tensor = tensors[name]
        owner = owners.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        if owner is tensor or not (tied and _is_head(name) and tensor.is_set_to(owner)):
            result[name] = tensor
    return dict(sorted(result.items(), key=lambda item: -item[1].element_size()))  # the widest first: all aligned


def _is_head(name: str) -> bool:
    return name.endswith("lm_head.weight")


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise ConversionError(f"{path.name} cannot be written: {name} has the unsupported dtype {tensor.dtype}")
    writer = SafetensorsWriter(path, tensors, {"format": "pt"})
    try:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
    except OSError:
        remove(path)
        raise
    finally:
        writer.close()
    written = TensorFile(path)
    for name, tensor in tensors.items():
        if not have_same_bytes(written[name], tensor):
            raise ConversionError(f"{path.name} differs from its source in {name}: is the disk sound?")
