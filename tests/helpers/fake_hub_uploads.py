"""What a hub receives: the requests of huggingface_hub's create_repo and create_commit, by the LFS protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

TOKEN = "hf_test"


@dataclass
class Uploads:
    """The state of a hub that clients write to.

    Attributes:
        private: Whether a repository that was created is private, by its name.
        blobs: Large contents by their hash. They stay when a client stops before its commit.
        refuse: Statuses of the next answers to uploads of large contents ("PUT") and to commits ("commit").
        commits: Repository and file names of each commit.
    """

    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    refuse: dict[str, list[int]] = field(default_factory=dict)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)


class UploadHandler:
    """The part of the request handler that serves POST and PUT."""

    def do_POST(self) -> None:
        body = self.received()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, b"{}", {})
        elif self.path == "/api/repos/create":
            self.create_repo(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/(models/.+)/preupload/main", self.path):
            self.preupload(match[1], json.loads(body)["files"])
        elif re.fullmatch(r"/.+\.git/info/lfs/objects/batch", self.path):
            self.answer({"objects": [self.lfs_object(each) for each in json.loads(body)["objects"]]})
        elif match := re.fullmatch(r"/api/(models/.+)/commit/main", self.path):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.reply(404, b"{}", {})

    def do_PUT(self) -> None:
        """Receive a large content."""
        body, uploads = self.received(), self.server.hub.uploads
        if uploads.refuse.get("PUT"):
            self.reply(uploads.refuse["PUT"].pop(0), b"", {})
            return
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == digest
        uploads.blobs[digest] = body
        self.reply(200, b"", {})

    def received(self) -> bytes:
        """Return the request's body, and log the request."""
        self.log_request_line()
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def create_repo(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        if f"models/{name}" in self.server.hub.repos:
            self.reply(409, json.dumps({"url": f"{self.server.hub.url}/{name}"}).encode(), {})
            return
        self.server.hub.repos[f"models/{name}"] = {}
        self.server.hub.uploads.private[name] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.answer({"url": f"{self.server.hub.url}/{name}"})

    def preupload(self, repo: str, files: list[dict[str, Any]]) -> None:
        present = self.server.hub.repos[repo]
        modes = {True: "lfs", False: "regular"}
        answers = []
        for each in files:
            content = present.get(each["path"])
            oid = None if content is None else hashlib.sha256(content).hexdigest()
            mode = modes[each["path"].endswith(".safetensors")]
            if content is not None and mode == "regular":
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            answers.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": answers})

    def lfs_object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.server.hub.uploads.blobs:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.server.hub.cdn}/put/{wanted['oid']}"}}}

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        hub, files = self.server.hub, {}
        if hub.uploads.refuse.get("commit"):
            self.reply(hub.uploads.refuse["commit"].pop(0), b"{}", {})
            return
        for line in lines[1:]:
            value = line["value"]
            is_large = line["key"] == "lfsFile"
            files[value["path"]] = hub.uploads.blobs[value["oid"]] if is_large else base64.b64decode(value["content"])
        hub.repos[repo] |= files
        hub.uploads.commits.append((repo, sorted(files)))
        self.answer({"commitUrl": f"{hub.url}/{repo}/commit/1", "commitOid": "1" * 40, "success": True})

    def answer(self, content: dict[str, Any]) -> None:
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})
