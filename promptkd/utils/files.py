"""Atomic writes, locks and checksums: a file or folder on disk is either complete or absent, even after a crash.

Functions raise `OSError` as the file system does. Callers turn it into a message that names the remedy.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol, TypedDict

from filelock import FileLock, Timeout

BLOCK_BYTES = 1 << 20


class FileDigest(TypedDict):
    """Size and checksum of a file, as manifests record them."""

    bytes: int
    sha256: str


class Hash(Protocol):
    """The methods of `hashlib` objects that this module calls."""

    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


def hash_file(path: Path, algorithm: Hash) -> str:
    """Feed a file into a `hashlib` object and return the hexadecimal digest."""
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            algorithm.update(block)
    return algorithm.hexdigest()


def digest_of(path: Path) -> FileDigest:
    """Return the size and the SHA-256 checksum of a file."""
    return {"bytes": os.path.getsize(path), "sha256": hash_file(path, hashlib.sha256())}


def sync_file(path: Path) -> None:
    """Flush a file to disk. For a folder, flush the names in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content. Ignore what cannot be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` in one move at the end of the `with` block.

    An error inside of the block leaves `path` as it was and removes the temporary file.

    Args:
        path: The file to create or to replace. Its folder must exist.
        mode: `"w"` for UTF-8 text or `"wb"` for bytes.

    Yields:
        The open temporary file.
    """
    temporary = path.with_name(f".{path.name}.new")
    remove(temporary)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    sync_file(path.parent)


def write_json(path: Path, content: Any, indent: int = 2) -> None:
    """Write a JSON file atomically."""
    with atomic_file(path) as file:
        file.write(json.dumps(content, indent=indent) + "\n")


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Create a temporary folder that replaces `folder` at the end of the `with` block.

    All files are flushed to disk before the move. An error inside of the block leaves `folder` as it was.

    Args:
        folder: The folder to create or to replace. Its parent must exist.

    Yields:
        The temporary folder, empty.
    """
    temporary = folder.with_name(f".{folder.name}.new")
    remove(temporary)
    try:
        temporary.mkdir()
        yield temporary
        replace_folder(temporary, folder)
    except BaseException:
        remove(temporary)
        raise


def replace_folder(source: Path, folder: Path) -> None:
    """Flush the folder `source` to disk and move it to `folder`, replacing what was there.

    `.<name>.old` exists during the move. If the process is killed in between, `restore_folder` brings it back.
    """
    for path in [*source.rglob("*"), source]:
        if not path.is_symlink():
            sync_file(path)
    restore_folder(folder)
    old = _old(folder)
    if folder.exists():
        folder.rename(old)
    try:
        source.rename(folder)
    except OSError:
        restore_folder(folder)
        raise
    sync_file(folder.parent)
    remove(old)


def restore_folder(folder: Path) -> None:
    """Undo a `replace_folder` that was killed between its two moves, or remove what a complete one left."""
    old = _old(folder)
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    else:
        remove(old)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def try_lock(path: Path) -> FileLock | None:
    """Lock a file for this process, without waiting.

    The lock ends with `release()` or with the process, so a crash leaves no stale lock. The lock file stays. On a
    file system that has no locks to give (`ENOLCK`), the returned object locks nothing.

    Args:
        path: The lock file, no link. It and its folder are created if needed.

    Returns:
        The lock, or None if another process holds it.
    """
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except OSError as error:
        if error.errno != errno.ENOLCK:
            raise
    return lock
