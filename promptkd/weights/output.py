"""Where the output goes: beside what is there until it is complete, then into its place; or nothing at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

from promptkd.errors import UserError
from promptkd.weights.reader import FORMATS, SHARD_NAME, shard_folder, whole_files
from promptkd.weights.tensor_files import inside, read_json

# What besides the weights makes a Hugging Face folder.
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


class Target:
    """A context: `folder` takes the weights' files, `commit()` puts them in place; leaving without it undoes all.

    root: the output path. size 1 puts the weights into root itself, other sizes into root/mp<size>.
    """

    def __init__(self, root: Path, size: int, kind: str) -> None:
        self.root, self.size, self.kind = root, size, kind
        self.final = root if size == 1 else shard_folder(root, size)
        self.staging = root / f".mp{size}.partial"
        self.folder = self.staging / "weights"

    def check(self, overwrite: bool) -> None:
        """UserError if something is there that would be replaced without --overwrite, or that never should be."""
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root} is not a folder: give another --output_path")
        if self.size == 1:
            there = whole_files(self.root) if self.root.is_dir() else []
        else:
            if self.final.is_symlink() or (self.final.exists() and not self.final.is_dir()):
                raise UserError(f"{self.final} is not a folder: move it away")
            there = sorted(path.name for path in self.final.iterdir()) if self.final.is_dir() else []
            if foreign := [name for name in there if not SHARD_NAME.fullmatch(name)]:
                raise UserError(f"{self.final} is in use: it holds {foreign[0]}, which is no shard: move it away")
        if there and not overwrite:
            raise UserError(
                f"{self.final} is in use: it holds {there[0]}; --overwrite replaces it, --output_path writes elsewhere"
            )

    def check_space(self, needed: int) -> None:
        """UserError unless `needed` bytes, and a little, are free where the output goes."""
        place = self.root
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if free < needed + (16 << 20):
            raise UserError(f"{place}: the output takes {in_words(needed)}, but only {in_words(free)} are free there")

    def side_files(self, source: Path, overwrite: bool) -> list[Path]:
        """config.json and the tokenizer's files that go along to another folder; UserError if others are in the way."""
        if self.root.resolve() == source.resolve():
            return []
        found = [inside(source, name) for name in SIDE_FILES if (source / name).exists()]
        for path in found:
            there = self.root / path.name
            if there.exists() and not overwrite and there.read_bytes() != path.read_bytes():
                raise UserError(f"{there} is another model's: --overwrite replaces it")
        return found

    def __enter__(self) -> Target:
        self._made = [path for path in (self.root, *self.root.parents) if not path.exists()]
        self.staging.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.staging, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(f"{self.staging} is in use: another convert_mp.py writes to {self.final}") from None
        shutil.rmtree(self.folder, ignore_errors=True)  # what a killed run may have left
        self.folder.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)
        shutil.rmtree(self.staging, ignore_errors=True)
        for path in self._made:
            if path.exists() and not any(path.iterdir()):
                path.rmdir()

    def copy_side_files(self, found: list[Path], dtype: str | None) -> None:
        """Copy them into place. `dtype`, where the weights' type was changed, is what config.json then says."""
        for path in found:
            copy = self.staging / path.name
            shutil.copyfile(path, copy)
            if path.name == "config.json" and dtype is not None:
                config = read_json(copy)
                config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
                copy.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            os.replace(copy, self.root / path.name)

    def commit(self) -> None:
        """Put the finished files in place, replacing what `check` has allowed."""
        _sync(self.folder)
        if self.size == 1:
            self._commit_whole()
        else:
            old = self.staging / "old"
            if self.final.exists():
                os.rename(self.final, old)
            try:
                os.rename(self.folder, self.final)
            except OSError:
                if old.exists():
                    os.rename(old, self.final)
                raise
        _sync(self.root)

    def _commit_whole(self) -> None:
        """The index last: files that no index names are not taken for a model by anyone, so none is ever half new."""
        new = {path.name for path in self.folder.iterdir()}
        old = set(whole_files(self.root))
        indices = {f"{single}.index.json" for single, _ in FORMATS.values()}
        for name in old & new & indices:
            os.remove(self.root / name)
        for name in sorted(new - indices) + sorted(new & indices):
            os.replace(self.folder / name, self.root / name)
        for name in sorted(old - new, key=lambda name: name not in indices):
            os.remove(self.root / name)


def in_words(count: int) -> str:
    """A number of bytes for people."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
