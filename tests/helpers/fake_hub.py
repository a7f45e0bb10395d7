"""A small Hugging Face hub on 127.0.0.1 for the tests: what huggingface_hub uses of its protocol, and faults.

Repositories are dictionaries of file contents. Large files are answered as the real hub does, with a redirect
to another origin (the "CDN", a second port), Range requests included.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from helpers.fake_hub_uploads import UploadHandler, Uploads
from helpers.training import ROOT
from promptkd.downloads import run
from promptkd.downloads.catalog import Item, load_catalog, select

TABLE = load_catalog(ROOT / "configs/downloads.json")
DOLLY = "datasets/MiniLLM/dolly"
RAW = b"".join(b'{"instruction": "Say %d"}\n' % i for i in range(2000))  # large: redirect and sha256
FILES = {"raw.jsonl": RAW, "valid.jsonl": b'{"instruction": "x"}\n', "README.md": b"# Dolly\n"}

REVISION = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1000  # bytes from which a file counts as large: sha256 and redirect


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None
    port: int


@dataclass
class FakeHub:
    """`repos` maps "models/owner/name" or "datasets/owner/name" to {file name: bytes}."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    # What is sent instead of a file's bytes from `start` on; used up after as many answers as are listed.
    faults: dict[str, list[Callable[[bytes], Fault]]] = field(default_factory=dict)
    gives_sizes: bool = True
    log: list[Request] = field(default_factory=list)
    uploads: Uploads = field(default_factory=Uploads)

    def __enter__(self) -> FakeHub:
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        for server in self._servers:
            server.hub, server.daemon_threads = self, True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def asked(self, name: str) -> list[Request]:
        """The GET requests for one file's bytes, as the origin that sends them saw them."""
        contents = [repo[name] for repo in self.repos.values() if name in repo]
        ends = {hashlib.sha256(c).hexdigest() if len(c) >= LARGE else name for c in contents}
        return [r for r in self.log if r.method == "GET" and r.path.rpartition("/")[2] in ends]


@dataclass
class Fault:
    """One answer that is not the whole truth."""

    body: bytes
    announced: int | None = None  # Content-Length; a connection that closes early if it is more than is sent
    status: int | None = None
    pause: float = 0.0  # seconds after each tenth of the body


def cut(after: int) -> Callable[[bytes], Fault]:
    """The connection breaks after so many bytes."""
    return lambda body: Fault(body[:after], announced=len(body))


def shortened(by: int) -> Callable[[bytes], Fault]:
    """A shorter file, said to be whole."""
    return lambda body: Fault(body[:-by])


def garbled(body: bytes) -> Fault:
    """Another content of the same length."""
    return Fault(bytes(byte ^ 1 for byte in body))


def slow(seconds: float) -> Callable[[bytes], Fault]:
    return lambda body: Fault(body, pause=seconds / 10)


def refused(status: int) -> Callable[[bytes], Fault]:
    return lambda body: Fault(b"", status=status)


class Handler(UploadHandler, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.log_request_line()
        if match := re.fullmatch(r"/api/(models|datasets)/(.+?)(?:/revision/[^/]+)?", path):
            self.send_listing(match[1], match[2])
        elif match := re.fullmatch(r"/(datasets/)?(.+?)/resolve/[^/]+/(.+)", path):
            self.send_named(f"{match[1] or 'models/'}{match[2]}", match[3])
        else:
            self.send_large(path.rsplit("/", 1)[1])

    do_HEAD = do_GET

    def log_request_line(self) -> str:
        """Log the request and return its path."""
        path, headers = unquote(urlsplit(self.path).path), self.headers
        request = Request(
            self.command, path, headers.get("Range"), headers.get("Authorization"), self.server.server_port
        )
        self.server.hub.log.append(request)
        return path

    def send_listing(self, kind: str, repo: str) -> None:
        files = self.server.hub.repos.get(f"{kind}/{repo}")
        if files is None:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        siblings = [_sibling(name, content, self.server.hub.gives_sizes) for name, content in files.items()]
        answer = {"id": repo, "sha": REVISION, "private": False, "siblings": siblings}
        self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def send_named(self, repo: str, name: str) -> None:
        content = self.server.hub.repos.get(repo, {}).get(name)
        if content is None:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif len(content) < LARGE:
            self.send_content(name, content, {"ETag": f'"{_blob_id(content)}"'})
        else:
            digest = hashlib.sha256(content).hexdigest()
            links = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            self.reply(302, b"", {"Location": f"{self.server.hub.cdn}/cdn/{digest}", **links})

    def send_large(self, digest: str) -> None:
        for repo in self.server.hub.repos.values():
            for name, content in repo.items():
                if hashlib.sha256(content).hexdigest() == digest:
                    self.send_content(name, content, {"ETag": f'"{digest}"'})
                    return
        self.reply(404, b"", {})

    def send_content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if start and start >= len(content):
            self.reply(416, b"", {})
            return
        body = content[start:]
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        waiting = self.server.hub.faults.get(name) if self.command == "GET" else None
        fault = waiting.pop(0)(body) if waiting else Fault(body)
        self.reply(fault.status or (206 if start else 200), fault.body, headers, fault)

    def reply(self, status: int, body: bytes, headers: dict[str, str], fault: Fault | None = None) -> None:
        fault = fault or Fault(body)
        announced = len(body) if fault.announced is None else fault.announced
        self.send_response(status)
        for key, value in {"X-Repo-Commit": REVISION, "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        if self.command == "HEAD":
            return
        step = max(1, len(body) // 10) if fault.pause else max(1, len(body))
        try:
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                self.wfile.flush()
                time.sleep(fault.pause)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client was stopped: that is what some tests do
        if announced != len(body):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sibling(name: str, content: bytes, with_size: bool) -> dict[str, object]:
    if not with_size:
        return {"rfilename": name}
    entry: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": _blob_id(content)}
    if len(content) >= LARGE:
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
    return entry


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A running hub with Dolly in it, which huggingface_hub takes for the real one, without its waits."""
    with FakeHub({DOLLY: dict(FILES)}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
        clock = SimpleNamespace(sleep=lambda seconds: None, time=time.time, monotonic=time.monotonic)
        monkeypatch.setattr("huggingface_hub.file_download.time", clock)
        monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # this hub has no Xet storage
        yield hub


def items(*keys: str) -> list[Item]:
    return select(TABLE, list(keys), [], False)


def item(key: str) -> Item:
    return items(key)[0]


def get(base: Path, *keys: str) -> int:
    """Download; how many items failed."""
    return run.download(items(*keys), base)


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
