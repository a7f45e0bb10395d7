"""A model on disk, whole or in tensor-parallel shards: found, opened, and read as if it were any other size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from promptkd.errors import UserError
from promptkd.weights.layout import HEAD, Family, pieces
from promptkd.weights.tensor_files import CHUNK_BYTES, RELEASE_BYTES, TensorFile, chunks, inside, open_file, read_json

FORMATS = {  # (a whole model's file, a shard's file)
    "safetensors": ("model.safetensors", "model_{}.safetensors"),
    "bin": ("pytorch_model.bin", "pytorch_model_{}.bin"),
}
SHARD_NAME = re.compile(r"(?:model_(\d+)\.safetensors|pytorch_model_(\d+)\.bin)")
WHOLE_NAME = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin"
    r"|(model\.safetensors|pytorch_model\.bin)\.index\.json"
)


def shard_folder(root: Path, size: int) -> Path:
    return root / f"mp{size}"


class Shard:
    """The tensors of one rank, by their full names, whichever files they are in."""

    def __init__(self, files: dict[str, TensorFile], family: Family, where: Path) -> None:
        """`files`: the file of each tensor, by the name it has there. `where`: for messages."""
        self.where = where
        bare = not any(name.startswith(family.base) for name in files)
        self._at = {family.base + name if bare and name != HEAD else name: (file, name) for name, file in files.items()}
        self.shapes = {name: file.shapes[there] for name, (file, there) in self._at.items()}
        self.dtypes = {name: file.dtypes[there] for name, (file, there) in self._at.items()}

    def tensor(self, name: str) -> torch.Tensor:
        file, there = self._at[name]
        return file.tensor(there)

    def release(self) -> None:
        for file in {id(file): file for file, _ in self._at.values()}.values():
            file.release()


class SourceModel:
    """All shards of a model, read at any other size: `parts(name, size, rank)`.

    Opening checks that the set of files is complete and is one set; `promptkd.weights.checks` checks the rest.
    """

    def __init__(self, root: Path, size: int, family: Family) -> None:
        self.root, self.size, self.family = root, size, family
        self.shards = [_open_whole(root, family)] if size == 1 else _open_shards(root, size, family)
        self._read = 0
        self.names = list(self.shards[0].shapes)
        self.dtypes = self.shards[0].dtypes

    def shape(self, name: str, size: int) -> tuple[int, ...]:
        """The tensor's shape in each shard of `size`; 1 for the whole tensor."""
        shape, cut = list(self.shards[0].shapes[name]), self.family.cut(name)
        if cut is not None:
            shape[cut.axis] = shape[cut.axis] * self.size // size
        return tuple(shape)

    def parts(self, name: str, size: int, rank: int) -> Iterator[torch.Tensor]:
        """Shard `rank` of `size` of the tensor, as consecutive contiguous parts of some megabytes."""
        cut = self.family.cut(name)
        if cut is None:
            yield from self._counted(chunks(self.shards[0].tensor(name)))
            return
        length = self.shape(name, 1)[cut.axis]
        taken = [
            self.shards[shard].tensor(name).narrow(cut.axis, start, stop - start)
            for shard, start, stop in pieces(length, cut.blocks, self.size, size, rank)
        ]
        if cut.axis == 0:
            for piece in taken:
                yield from self._counted(chunks(piece))
            return
        row = sum(piece.shape[1] for piece in taken) * taken[0].element_size()
        step = max(1, CHUNK_BYTES // max(1, row))
        for start in range(0, len(taken[0]), step):
            yield from self._counted([torch.cat([piece[start : start + step] for piece in taken], dim=1)])

    def piece(self, name: str, size: int, rank: int) -> torch.Tensor:
        """The same in one tensor."""
        return torch.cat([part.reshape(-1) for part in self.parts(name, size, rank)]).view(self.shape(name, size))

    def release(self) -> None:
        """Give back the memory of pages read, once there are many; call it when no part is in use."""
        if self._read > RELEASE_BYTES:
            self._read = 0
            for shard in self.shards:
                shard.release()

    def _counted(self, parts: Iterator[torch.Tensor] | list[torch.Tensor]) -> Iterator[torch.Tensor]:
        for part in parts:
            self._read += part.nbytes
            yield part


def whole_files(root: Path) -> list[str]:
    """The names of all files in `root` that belong to a whole model's weights, in whichever format."""
    return sorted(path.name for path in root.iterdir() if WHOLE_NAME.fullmatch(path.name))


def _open_whole(root: Path, family: Family) -> Shard:
    """A Hugging Face folder's weights; of several formats the one that transformers would load."""
    for single, _ in FORMATS.values():
        if (root / single).is_file():
            file = open_file(inside(root, single))
            return Shard(dict.fromkeys(file.shapes, file), family, file.path)
        index = root / f"{single}.index.json"
        if index.is_file():
            return Shard(_indexed(root, inside(root, index.name)), family, index)
    sizes = _sizes_there(root)
    raise UserError(
        f"{root} holds no model.safetensors or pytorch_model.bin, nor an index of several files"
        + (f"; it holds shards of size {sizes}: give --source_mp_size" if sizes else "")
    )


def _indexed(root: Path, index: Path) -> dict[str, TensorFile]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} lacks its weight_map")
    files = {}
    for name in weight_map.values():
        if not isinstance(name, str) or not name.endswith((".safetensors", ".bin")):
            raise UserError(f"{index} names {name!r}, which is no file of weights")
        if name not in files:
            files[name] = open_file(inside(root, name))
    for tensor, name in weight_map.items():
        if tensor not in files[name].shapes:
            raise UserError(f"{root / name} lacks {tensor}, which {index.name} says it holds")
    return {tensor: files[name] for tensor, name in weight_map.items()}


def _sizes_there(root: Path) -> str:
    sizes = sorted(int(path.name[2:]) for path in root.glob("mp*") if path.name[2:].isdecimal())
    return ", ".join(map(str, sizes))


def _open_shards(root: Path, size: int, family: Family) -> list[Shard]:
    folder = shard_folder(root, size)
    if not folder.is_dir():
        sizes = _sizes_there(root)
        there = f"shards of size {sizes} are there" if sizes else f"--input_path is the folder that holds {folder.name}"
        raise UserError(f"{folder} does not exist: {there}")
    if not folder.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{folder} is a link that leads out of its folder: copy the shards themselves there")
    found = [path.name for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name)]
    kinds = {name: [pattern.format(rank) for rank in range(size)] for name, (_, pattern) in FORMATS.items()}
    present = [kind for kind, names in kinds.items() if any(_kind(name) == kind for name in found)]
    if len(present) > 1:
        raise UserError(f"{folder} holds shards in two formats (.safetensors and .bin): keep one of them there")
    names = kinds[present[0]] if present else kinds["safetensors"]
    if extra := sorted(set(found) - set(names)):
        raise UserError(f"{folder} holds {extra[0]}, which is no shard of size {size}: shards of two sizes are mixed")
    if not found:
        raise UserError(f"{folder} holds no shards: model_<i>.safetensors or pytorch_model_<i>.bin")
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{folder / missing[0]} is missing: size {size} takes {size} shards")
    return [_open_shard(inside(folder, name), rank, size, family) for rank, name in enumerate(names)]


def _kind(name: str) -> str:
    return "bin" if name.endswith(".bin") else "safetensors"


def _open_shard(path: Path, rank: int, size: int, family: Family) -> Shard:
    file = open_file(path)
    said = file.metadata.get("mp_rank"), file.metadata.get("mp_size")
    if said not in ((None, None), (str(rank), str(size))):
        raise UserError(f"{path} was written as shard {said[0]} of {said[1]}, not as {rank} of {size}")
    return Shard(dict.fromkeys(file.shapes, file), family, path)
