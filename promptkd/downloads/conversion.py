"""Convert PyTorch's pickle files to safetensors, which hold only tensors and cannot run code."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from promptkd.errors import UserError
from promptkd.utils.strict_json import read_object
from promptkd.weights.families import FAMILIES
from promptkd.weights.output import write_index
from promptkd.weights.safetensors_io import widest_first, write_verified
from promptkd.weights.torch_files import read_tensors


def safetensors_name(name: str) -> str:
    """Return the name of the safetensors file, or index, that replaces a pickle file, or its index."""
    return name.replace("pytorch_model", "model", 1).replace(".bin", ".safetensors", 1)


def convert(sources: list[Path], config: Path, folder: Path) -> None:
    """Write the tensors of pickle files as safetensors files, with an index unless it is one complete file.

    Values and dtypes are unchanged. Files are memory-mapped, so memory stays small for files of any size.

    Args:
        sources: The pickle files. Each becomes one safetensors file.
        config: The model's config.json.
        folder: The folder to write into.

    Raises:
        RefusedError: If a file holds anything but tensors.
        UserError: If the files do not fit together, or a copy reads back with another content.
    """
    tied = _is_tied(config)
    files: dict[str, dict[str, Tensor]] = {}
    for source in sources:
        tensors = _without_tied_head(read_tensors(source, legacy=True), tied)
        if repeated := tensors.keys() & {name for others in files.values() for name in others}:
            raise UserError(f"{source.name} repeats {min(repeated)}, which another file holds: get the files again")
        name = safetensors_name(source.name)
        write_verified(folder / name, tensors, None, {"format": "pt"})
        files[name] = {key: tensor.to("meta") for key, tensor in tensors.items()}
    if "model.safetensors" not in files:
        write_index(folder, files)


def _is_tied(config: Path) -> bool:
    settings = read_object(config, "it cannot be used")
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
    return widest_first(result)


def _is_head(name: str) -> bool:
    return name.endswith("lm_head.weight")
