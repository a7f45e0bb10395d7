"""List and fetch the files of a repository, from the Hugging Face hub or from its cache on this machine.

`huggingface_hub` does the transfers, so HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the proxy variables apply. It resumes
after a broken connection. A file that a stopped run left incomplete starts again. Complete files are kept.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import httpx2
from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download
from huggingface_hub.hf_api import DatasetInfo, ModelInfo

from promptkd.errors import UserError
from promptkd.utils.files import hash_file

LISTING_TIMEOUT = 30.0  # seconds
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class HubError(UserError):
    """Why one item cannot be downloaded. Other items are not affected."""


class Unreachable(HubError):
    """The hub does not answer."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. Fields that the hub did not give are None."""

    path: str  # in the repository, parts divided by "/"
    size: int | None = None  # bytes
    sha256: str | None = None  # of the content, for large files
    git_sha1: str | None = None  # git's blob id, for small files

    def is_at(self, path: Path) -> bool:
        """Whether the file on disk is this one: its size and, where the hub gives one, its hash are equal."""
        if not path.is_file() or self.size is None or path.stat().st_size != self.size:
            return False
        if self.sha256:
            return hash_file(path, hashlib.sha256()) == self.sha256
        return self.git_sha1 in (None, hash_file(path, hashlib.sha1(b"blob %d\0" % self.size)))


@dataclass(frozen=True)
class Listing:
    """The files of one revision of one repository."""

    repo: str
    kind: str  # "model" or "dataset"
    revision: str
    files: tuple[RemoteFile, ...]
    cache: Path | None = None  # the folder that holds them, in the hub's cache


def check_name(path: str) -> str:
    """Return a file name of a repository if it stays in its folder.

    Raises:
        HubError: If it does not.
    """
    parts = path.split("/")
    if (
        any(part in ("", ".", "..") for part in parts)
        or "\\" in path
        or PureWindowsPath(path).drive
        or not path.isprintable()
    ):
        raise HubError(f"refused: it lists a file name that leaves its folder: {path!r}")
    return path


def list_files(repo: str, kind: str) -> Listing:
    """List the newest revision of a repository or, with HF_HUB_OFFLINE, the cached one.

    Args:
        repo: The repository's name.
        kind: "model" or "dataset".

    Raises:
        HubError: If there is no such repository.
        Unreachable: If the hub does not answer.
    """
    if constants.is_offline_mode():
        return _list_cache(repo, kind)
    with one_line_errors(repo):
        info = HfApi().repo_info(repo, repo_type=kind, files_metadata=True, timeout=LISTING_TIMEOUT)
        assert isinstance(info, ModelInfo | DatasetInfo)
        files = tuple(
            RemoteFile(
                check_name(sibling.rfilename),
                sibling.size,
                _hexadecimal(sibling.lfs.sha256 if sibling.lfs else None, 64),
                None if sibling.lfs else _hexadecimal(sibling.blob_id, 40),
            )
            for sibling in info.siblings or ()
        )
        return Listing(repo, kind, _hexadecimal(info.sha, 40) or constants.DEFAULT_REVISION, files)


def fetch(listing: Listing, file: RemoteFile, folder: Path) -> None:
    """Bring one file to its path below `folder`, and check that its hash is the hub's.

    Args:
        listing: The repository's listing.
        file: One of its files.
        folder: The folder that collects the repository's files.

    Raises:
        HubError: If the hub refuses or sends another content.
        OSError: If the disk is full or not writable.
    """
    path = folder / file.path
    if file.is_at(path):  # compared by hash, because another revision's file may have the same size
        return
    path.unlink(missing_ok=True)
    if listing.cache is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(listing.cache / file.path, path)
        return
    with one_line_errors(listing.repo):
        hf_hub_download(listing.repo, file.path, repo_type=listing.kind, revision=listing.revision, local_dir=folder)
    if file.size is not None and not file.is_at(path):
        path.unlink()
        raise HubError(f"{file.path} arrived damaged (its hash is not the hub's); it was removed")


def _list_cache(repo: str, kind: str) -> Listing:
    try:
        folder = Path(snapshot_download(repo, repo_type=kind, local_files_only=True))
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        raise HubError(f"HF_HUB_OFFLINE is set and this machine's hub cache has no complete copy of {repo}") from None
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = tuple(RemoteFile(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)
    return Listing(repo, kind, folder.name, files, cache=folder)


def _hexadecimal(value: str | None, length: int) -> str | None:
    return value if value and re.fullmatch(f"[0-9a-f]{{{length}}}", value) else None


@contextmanager
def one_line_errors(repo: str) -> Iterator[None]:
    """Turn the library's exceptions into one line that says what to do. A full disk stays an OSError."""
    try:
        try:
            yield
        except errors.LocalEntryNotFoundError as error:  # wraps the error of the request for a file's headers
            raise error.__cause__ or Unreachable(str(error)) from None
    except errors.GatedRepoError:
        raise HubError(f"{repo}: accept its terms on the hub and set HF_TOKEN to a token") from None
    except errors.RepositoryNotFoundError:
        raise HubError(f"the hub has no repository {repo}, or shows it only with a token in HF_TOKEN") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = "check HF_TOKEN" if status in (401, 403) else "try again later"
        raise HubError(f"the hub answered {status} for {repo}: {advice}") from None
    except httpx2.TransportError as error:
        raise Unreachable(f"{type(error).__name__}: {error}") from None
    except (httpx2.HTTPError, errors.FileMetadataError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise HubError(f"{constants.ENDPOINT} does not answer like a hub (check HF_ENDPOINT): {reason}") from None
    except OSError as error:
        if error.errno in FULL_DISK or "Consistency check" not in str(error):
            raise
        raise HubError("a file was cut short; run the same command again") from None
