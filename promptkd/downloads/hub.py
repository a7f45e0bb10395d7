"""What the Hugging Face hub, or its cache on this machine, holds; and one file of it on disk, checked.

huggingface_hub does the talking, so HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the proxy variables mean what
they mean everywhere. Its own download of a file drops what it has when it is interrupted, which for 18 GB is
too much: here the part stays and the next run asks for the rest.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import httpx2
from huggingface_hub import HfApi, constants, errors, hf_hub_url, snapshot_download
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

LISTING_TIMEOUT = 30.0  # seconds


class HubError(Exception):
    """Why one item cannot be had, in one line. The others go on."""


class Unreachable(HubError):
    """Nothing at all came back."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; what is None the hub did not say."""

    path: str  # in the repository, parts divided by "/"
    size: int | None = None  # bytes
    sha256: str | None = None  # of the content: large files
    git_sha1: str | None = None  # git's blob id: small files

    def is_at(self, path: Path) -> bool:
        """Whether the file on disk is this one, by size and by content where the hub gives a hash of it."""
        if not path.is_file() or self.size is None or path.stat().st_size != self.size:
            return False
        return (self.sha256 or self.git_sha1) in (None, self.digest(path))

    def digest(self, path: Path) -> str:
        """Of the file on disk, the hash that the hub gives for this one."""
        sha = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
        return sha.hexdigest()


@dataclass(frozen=True)
class Listing:
    """The files of one revision of one repository."""

    repo: str
    kind: str  # "model" or "dataset"
    revision: str
    files: tuple[RemoteFile, ...]


def check_name(path: str) -> str:
    """Return the name of a file in a repository if it stays in its folder. Raises HubError if it does not."""
    parts = path.split("/")
    if (
        any(part in ("", ".", "..") for part in parts)
        or "\\" in path
        or PureWindowsPath(path).drive
        or not path.isprintable()
    ):
        raise HubError(f"refused: it lists a file name that leaves its folder: {path!r}")
    return path


def part_path(destination: Path, file: RemoteFile) -> Path:
    """Where a file grows. The name holds its content's hash: parts of two versions are never joined."""
    identity = file.sha256 or file.git_sha1 or "unknown"
    return destination.with_name(f".{destination.name}.{identity[:16]}.part")


def open_source() -> Hub | LocalCache:
    """The hub, or with HF_HUB_OFFLINE its cache on this machine."""
    return LocalCache() if constants.is_offline_mode() else Hub()


class Hub:
    """The hub at HF_ENDPOINT."""

    def listing(self, repo: str, kind: str) -> Listing:
        """The newest revision. Raises HubError, Unreachable."""
        with _in_one_line(repo):
            info = HfApi().repo_info(repo, repo_type=kind, files_metadata=True, timeout=LISTING_TIMEOUT)
            files = [
                RemoteFile(
                    check_name(sibling.rfilename),
                    sibling.size,
                    _hexadecimal(sibling.lfs.sha256 if sibling.lfs else None, 64),
                    None if sibling.lfs else _hexadecimal(sibling.blob_id, 40),
                )
                for sibling in info.siblings or ()
            ]
            return Listing(repo, kind, _hexadecimal(info.sha, 40) or constants.DEFAULT_REVISION, tuple(files))

    def fetch(self, listing: Listing, file: RemoteFile, destination: Path) -> None:
        """Bring one file to `destination`, where it appears only when it is whole and its hash is right.

        What a run before this one got is kept and continued. Raises HubError, OSError (full disk)."""
        if file.is_at(destination):  # by its hash: an older revision's file may have the same size
            return
        destination.parent.mkdir(parents=True, exist_ok=True)
        part = part_path(destination, file)
        if part.is_file() and (file.size is None or part.stat().st_size > file.size):
            part.unlink()  # it cannot be told how it goes on
        url = hf_hub_url(listing.repo, file.path, repo_type=listing.kind, revision=listing.revision)
        headers = build_hf_headers(headers={"Accept-Encoding": "identity"})  # a packed answer cannot be continued
        with _in_one_line(listing.repo), part.open("ab") as stream:
            http_get(
                url,
                stream,
                resume_size=stream.tell(),
                headers=headers,
                expected_size=file.size,
                displayed_filename=file.path,
            )
        if file.size is not None and not file.is_at(part):
            part.unlink()
            raise HubError(f"{file.path} arrived damaged (its hash is not the hub's); nothing of it was kept")
        os.replace(part, destination)


class LocalCache:
    """What earlier downloads of other programs left in the hub's cache (HF_HOME)."""

    def __init__(self) -> None:
        self._folders: dict[Listing, Path] = {}

    def listing(self, repo: str, kind: str) -> Listing:
        """The cached revision. Raises HubError."""
        try:
            folder = Path(snapshot_download(repo, repo_type=kind, local_files_only=True))
        except (errors.LocalEntryNotFoundError, OSError, ValueError):
            raise HubError(f"HF_HUB_OFFLINE is set and this machine's hub cache has no whole copy of {repo}") from None
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = [RemoteFile(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths]
        listing = Listing(repo, kind, folder.name, tuple(files))
        self._folders[listing] = folder
        return listing

    def fetch(self, listing: Listing, file: RemoteFile, destination: Path) -> None:
        """Copy one file. Raises OSError."""
        destination.parent.mkdir(parents=True, exist_ok=True)
        part = part_path(destination, file)
        shutil.copyfile(self._folders[listing] / file.path, part)
        os.replace(part, destination)


def _hexadecimal(value: str | None, length: int) -> str | None:
    return value if value and re.fullmatch(f"[0-9a-f]{{{length}}}", value) else None


@contextmanager
def _in_one_line(repo: str) -> Iterator[None]:
    """Turn what the library raises into one line that says what to do. A full disk passes through."""
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(f"{repo} wants its terms accepted on the hub, and then a token in HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise HubError(f"the hub has no repository {repo}, or shows it only with a token in HF_TOKEN") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = "check HF_TOKEN" if status in (401, 403) else "try again later"
        raise HubError(f"the hub answered {status} for {repo}: {advice}") from None
    except httpx2.TransportError as error:
        raise Unreachable(f"{type(error).__name__}: {error}") from None
    except (httpx2.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise HubError(f"what {constants.ENDPOINT} says is not a hub's answer (HF_ENDPOINT?): {why}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or "Consistency check" not in str(error):
            raise
        raise HubError("a file was cut short; what came is kept and the next run continues it") from None
