"""TODO."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from promptkd.errors import RunError


def remove(path: Path) -> None:
    """Remove a folder and all in it, or a file or link of that name. What cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a folder beside its place, then put it there in one move, replacing what was there.

    The folder around it has to be there. Raises RunError when it is not, or the disk is full: what was there stays.
    """
    beside, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old"))
    for leftover in (beside, old):
        remove(leftover)
    try:
        beside.mkdir()
        fill(beside)
        for path in beside.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        sync_folder(beside)
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
        sync_folder(folder.parent)  # a checkpoint written after this may speak of it
    except (OSError, SafetensorError) as error:  # safetensors' writer has errors of its own for a full disk
        shutil.rmtree(beside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{folder} cannot be written ({reason}): make room and start it again with --resume") from None
    shutil.rmtree(old, ignore_errors=True)


def fingerprint(path: str) -> dict[str, Any]:
    """Names, sizes and the ends' bytes of a folder's files in one digest: cheap, and changes when they do."""
    digest, total = hashlib.sha256(), 0
    files = sorted(
        file for pattern in ("*", "mp*/*", "*/*.arrow") for file in Path(path).glob(pattern) if file.is_file()
    )
    for file in files:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            head = stream.read(1 << 16)
            stream.seek(max(size - (1 << 16), 0))
            digest.update(f"{file.name}:{size}:".encode() + head + stream.read())
        total += size
    return {"files": len(files), "bytes": total, "sha256_of_ends": digest.hexdigest()}


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one move. Raises OSError as the file system does; then nothing is left behind."""
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError:
        remove(beside)
        raise
