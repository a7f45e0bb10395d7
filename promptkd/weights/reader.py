"""Open a model on disk, complete or in tensor-parallel shards, and read it at any tensor-parallel size."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promptkd.errors import UserError
from promptkd.utils.strict_json import read_object
from promptkd.weights.families import HEAD, Family
from promptkd.weights.layout import pieces
from promptkd.weights.safetensors_io import TensorFile
from promptkd.weights.torch_files import open_tensors

FORMATS = {  # format: (file of a complete model, file of a shard)
    "safetensors": ("model.safetensors", "model_{}.safetensors"),
    "bin": ("pytorch_model.bin", "pytorch_model_{}.bin"),
}
SHARD_NAME = re.compile(r"(?:model_(\d+)\.safetensors|pytorch_model_(\d+)\.bin)")
MODEL_NAME = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin"
    r"|(model\.safetensors|pytorch_model\.bin)\.index\.json"
)


def inside(folder: Path, name: object) -> Path:
    """Return the path of a file in `folder` after checking its name.

    A snapshot in the Hugging Face cache consists of links into its repository's folder. Those are followed.

    Raises:
        UserError: If the file is missing, not a plain file name, or a link that leads out of the folder.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise UserError(f"{folder}: {name!r} is not the name of a file in that folder: use the model's own index")
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} is missing: copy all of the model's files there")
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        raise UserError(f"{path} is a link that leads out of its folder: copy the file itself there")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object."""
    return read_object(path, "use the model's own file")


class Shard(Mapping[str, Tensor]):
    """The tensors of one tensor-parallel rank under their full names, from one or several files.

    Args:
        files: The file of each tensor, by the tensor's name in that file.
        family: The model's family.
        path: The shard's file or index, for messages.

    Attributes:
        layout: Every tensor on the meta device, for its shape and dtype.
    """

    def __init__(self, files: Mapping[str, TensorFile], family: Family, path: Path) -> None:
        self.path = path
        bare = not any(name.startswith(family.base) for name in files)
        self._places = {
            family.base + name if bare and name != HEAD else name: (file, name) for name, file in files.items()
        }
        self.layout = {name: file.layout[stored] for name, (file, stored) in self._places.items()}

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._places[name]
        return file[stored]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class SourceModel:
    """All shards of a model, read at any other tensor-parallel size.

    The constructor checks that no file is missing or foreign. `promptkd.weights.checks` checks their content.

    Args:
        root: The model's folder, which holds the weights or, for `size` above 1, the folder `mp<size>`.
        size: The tensor-parallel size of the files.
        family: The model's family.
    """

    def __init__(self, root: Path, size: int, family: Family) -> None:
        self.root, self.size, self.family = root, size, family
        self.shards = [_open_complete(root, family)] if size == 1 else _open_shards(root, size, family)
        self.layout = self.shards[0].layout
        self.names = list(self.layout)

    def shape(self, name: str, size: int) -> tuple[int, ...]:
        """Return a tensor's shape in each shard of a model of tensor-parallel size `size`."""
        shape, cut = list(self.layout[name].shape), self.family.cut(name)
        if cut is not None:
            shape[cut.axis] = shape[cut.axis] * self.size // size
        return tuple(shape)

    def piece(self, name: str, size: int, rank: int) -> Tensor:
        """Read the part of a tensor that shard `rank` of `size` holds, as a contiguous copy in memory."""
        cut = self.family.cut(name)
        if cut is None:
            return self.shards[0][name].clone(memory_format=torch.contiguous_format)
        length = self.shape(name, 1)[cut.axis]
        parts = [
            self.shards[shard][name].narrow(cut.axis, start, stop - start)
            for shard, start, stop in pieces(length, cut.blocks, self.size, size, rank)
        ]
        return torch.cat(parts, dim=cut.axis).contiguous()


def shard_folder(root: Path, size: int) -> Path:
    """Return the folder of the shards of tensor-parallel size `size`."""
    return root / f"mp{size}"


def model_files(root: Path) -> list[str]:
    """List the files in `root` that belong to a complete model's weights, in any format."""
    return sorted(path.name for path in root.iterdir() if MODEL_NAME.fullmatch(path.name))


def _open_complete(root: Path, family: Family) -> Shard:
    """Open a Hugging Face folder. Of several formats, take the one that transformers would load."""
    for single, _ in FORMATS.values():
        if (root / single).is_file():
            file = open_tensors(inside(root, single))
            return Shard(dict.fromkeys(file, file), family, file.path)
        index = root / f"{single}.index.json"
        if index.is_file():
            return Shard(_open_indexed(root, inside(root, index.name)), family, index)
    sizes = _existing_sizes(root)
    raise UserError(
        f"{root} holds no model.safetensors or pytorch_model.bin, nor an index of several files"
        + (f"; it holds shards of size {sizes}: give --source_mp_size" if sizes else "")
    )


def _open_indexed(root: Path, index: Path) -> dict[str, TensorFile]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} lacks its weight_map: use the model's own index")
    files: dict[str, TensorFile] = {}
    for name in weight_map.values():
        if not isinstance(name, str) or not name.endswith((".safetensors", ".bin")):
            raise UserError(f"{index} names {name!r}, which is not a weight file: use the model's own index")
        if name not in files:
            files[name] = open_tensors(inside(root, name))
    for tensor, name in weight_map.items():
        if tensor not in files[name]:
            raise UserError(f"{root / name} lacks {tensor}, which {index.name} says it holds: get the files again")
    return {tensor: files[name] for tensor, name in weight_map.items()}


def _existing_sizes(root: Path) -> str:
    sizes = sorted(int(path.name[2:]) for path in root.glob("mp*") if path.name[2:].isdecimal())
    return ", ".join(map(str, sizes))


def _open_shards(root: Path, size: int, family: Family) -> list[Shard]:
    folder = shard_folder(root, size)
    if not folder.is_dir():
        sizes = _existing_sizes(root)
        hint = f"the folder has shards of size {sizes}" if sizes else f"--input_path must hold {folder.name}"
        raise UserError(f"{folder} does not exist: {hint}")
    if not folder.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{folder} is a link that leads out of its folder: copy the shards themselves there")
    present = [path.name for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name)]
    expected = {ending: [pattern.format(rank) for rank in range(size)] for ending, (_, pattern) in FORMATS.items()}
    formats = [ending for ending in expected if any(name.endswith(f".{ending}") for name in present)]
    if not formats:
        raise UserError(f"{folder} holds no shards: model_<i>.safetensors or pytorch_model_<i>.bin")
    if len(formats) > 1:
        raise UserError(f"{folder} holds shards in two formats (.safetensors and .bin): keep one of them there")
    names = expected[formats[0]]
    if extra := sorted(set(present) - set(names)):
        raise UserError(f"{folder} holds {extra[0]}, which is not a shard of size {size}: two sizes are mixed")
    if missing := [name for name in names if name not in present]:
        raise UserError(f"{folder / missing[0]} is missing: size {size} takes {size} shards")
    return [_open_shard(inside(folder, name), rank, size, family) for rank, name in enumerate(names)]


def _open_shard(path: Path, rank: int, size: int, family: Family) -> Shard:
    file = open_tensors(path)
    written = file.metadata.get("mp_rank"), file.metadata.get("mp_size")
    if written not in ((None, None), (str(rank), str(size))):
        raise UserError(
            f"{path} was written as shard {written[0]} of {written[1]}, not as {rank} of {size}: restore its name"
        )
    return Shard(dict.fromkeys(file, file), family, path)
