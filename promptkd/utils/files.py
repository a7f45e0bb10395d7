"""Atomic writes, locks and checksums: a file or folder on disk is either complete or absent, even after a crash.

Functions raise `OSError` as the file system does, unless their documentation says otherwise. Callers turn it into a
message that names the remedy.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol, TypedDict

from filelock import FileLock, Timeout

from promptkd.errors import UserError

BLOCK_BYTES = 1 << 20
END_BYTES = 1 << 16  # bytes from each end of a file that `fingerprint` reads


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


def fingerprint(folder: str | Path) -> dict[str, Any]:
    """Return one checksum of the names, sizes and both ends of a folder's files.

    It is cheap for files of many gigabytes, and changes whenever training or conversion rewrites the folder.
    """
    digest, total = hashlib.sha256(), 0
    files = sorted(
        file for pattern in ("*", "mp*/*", "*/*.arrow") for file in Path(folder).glob(pattern) if file.is_file()
    )
    for file in files:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            head = stream.read(END_BYTES)
            stream.seek(max(size - END_BYTES, 0))
            digest.update(f"{file.name}:{size}:".encode() + head + stream.read())
        total += size
    return {"files": len(files), "bytes": total, "sha256_of_ends": digest.hexdigest()}


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


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as file:
        file.write(text)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Create a temporary folder whose files move into `folder` together at the end of the `with` block.

    Other files in `folder` stay. After an error nothing is left, not even the folders that were created.

    Args:
        folder: The folder for the files. It and its parents are created if needed.

    Yields:
        The temporary folder, empty.

    Raises:
        UserError: The files cannot be written.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
        try:
            yield staging
            files = sorted(staging.iterdir())
            for file in files:
                sync_file(file)
            for file in files:
                os.replace(file, folder / file.name)
            missing = []
        finally:
            remove(staging)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


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


def lock_folder(folder: Path, option: str = "--save") -> FileLock:
    """Create a folder if needed and lock it for this process, see `try_lock`.

    Args:
        folder: The folder that an option names.
        option: The option, for error messages.

    Raises:
        UserError: The folder cannot be created, or another process has locked it.
    """
    path = folder / ".lock"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option} {folder} is a file: name a folder")
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise UserError(f"{option} {folder}: .lock in it is not a file: remove it, or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = try_lock(path)
    except OSError as error:
        raise UserError(f"{option} {folder} cannot be created ({error.strerror}): name another folder") from None
    if lock is None:
        raise UserError(f"{option} {folder} is in use by another run: name another folder")
    return lock
