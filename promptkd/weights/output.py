"""The destination of a conversion: files appear in their place when all are complete, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from promptkd.errors import UserError
from promptkd.utils.files import remove, replace_folder, sync_file, try_lock, write_json
from promptkd.utils.format import format_bytes
from promptkd.weights.reader import FORMATS, SHARD_NAME, inside, model_files, read_json, shard_folder

SPARE_BYTES = 16 << 20  # left free on the disk
# The files of a Hugging Face folder besides the weights.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def write_index(folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the index of a model in several files, as transformers reads it.

    Args:
        folder: The folder of the files.
        files: The files' names and their tensors, which may be on the meta device.
    """
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    single, _ = FORMATS["bin" if next(iter(files)).endswith(".bin") else "safetensors"]
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / f"{single}.index.json", index)


class Output:
    """A context manager: write the weights into `folder`, then call `commit()`. Leaving without it undoes everything.

    Args:
        root: The output path. Size 1 writes into it, other sizes into its subfolder `mp<size>`.
        size: The output's tensor-parallel size.
    """

    def __init__(self, root: Path, size: int) -> None:
        self.root, self.size = root, size
        self.final = root if size == 1 else shard_folder(root, size)
        self.staging = root / f".mp{size}.partial"
        self.folder = self.staging / "weights"

    def check(self, overwrite: bool) -> None:
        """Check that nothing is replaced without --overwrite, and that other people's files are never replaced.

        Raises:
            UserError: If the place is taken.
        """
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root} is not a folder: give another --output_path")
        if self.size == 1:
            existing = model_files(self.root) if self.root.is_dir() else []
        else:
            if self.final.is_symlink() or (self.final.exists() and not self.final.is_dir()):
                raise UserError(f"{self.final} is not a folder: move it away")
            existing = sorted(path.name for path in self.final.iterdir()) if self.final.is_dir() else []
            if foreign := [name for name in existing if not SHARD_NAME.fullmatch(name)]:
                raise UserError(f"{self.final} is in use: it holds {foreign[0]}, which is not a shard: move it away")
        if existing and not overwrite:
            raise UserError(
                f"{self.final} is in use: it holds {existing[0]}; "
                "--overwrite replaces it, --output_path writes elsewhere"
            )

    def check_space(self, needed: int) -> None:
        """Check that the disk has room for `needed` bytes.

        Raises:
            UserError: If it does not.
        """
        folder = next(folder for folder in (self.root, *self.root.resolve().parents) if folder.exists())
        free = shutil.disk_usage(folder).free
        if free < needed + SPARE_BYTES:
            raise UserError(
                f"{folder}: the output takes {format_bytes(needed)}, but only {format_bytes(free)} are free there: "
                "make room or give another --output_path"
            )

    def side_files(self, source: Path, overwrite: bool) -> list[Path]:
        """List the source's config.json and tokenizer files that must be copied to another output path.

        Raises:
            UserError: If different files of these names exist there, without --overwrite.
        """
        if self.root.resolve() == source.resolve():
            return []
        side = [inside(source, name) for name in SIDE_FILES if (source / name).exists()]
        for path in side:
            existing = self.root / path.name
            if existing.exists() and not overwrite and existing.read_bytes() != path.read_bytes():
                raise UserError(f"{existing} is another model's: --overwrite replaces it")
        return side

    def __enter__(self) -> Output:
        self._created = [path for path in (self.root, *self.root.parents) if not path.exists()]
        self.staging.mkdir(parents=True, exist_ok=True)
        lock = try_lock(self.staging / ".lock")
        if lock is None:
            raise UserError(f"{self.staging} is in use: another convert_mp.py writes to {self.final}")
        self._lock = lock
        remove(self.folder)  # a killed run may have left it
        self.folder.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        remove(self.staging)
        self._lock.release()
        for path in self._created:
            if path.exists() and not any(path.iterdir()):
                path.rmdir()

    def copy_side_files(self, side: list[Path], dtype: str | None) -> None:
        """Copy config.json and the tokenizer. If `dtype` is given, config.json says it."""
        for path in side:
            copy = self.staging / path.name
            shutil.copyfile(path, copy)
            if path.name == "config.json" and dtype is not None:
                config = read_json(copy)
                config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
                write_json(copy, config)
            os.replace(copy, self.root / path.name)

    def commit(self) -> None:
        """Move the files into place, replacing what `check` allowed."""
        if self.size > 1:
            replace_folder(self.folder, self.final)
            return
        # The index moves last. Nobody takes files that no index names for a model, so none is ever half new.
        new = {path.name for path in self.folder.iterdir()}
        for name in new:
            sync_file(self.folder / name)
        old = set(model_files(self.root))
        indices = {f"{single}.index.json" for single, _ in FORMATS.values()}
        for name in old & new & indices:
            os.remove(self.root / name)
        for name in sorted(new - indices) + sorted(new & indices):
            os.replace(self.folder / name, self.root / name)
        for name in sorted(old - new, key=lambda name: name not in indices):
            os.remove(self.root / name)
        sync_file(self.root)
