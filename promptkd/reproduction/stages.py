"""The stages of a reproduction: commands in order, what each leaves on disk, and running those that are not done."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from promptkd.errors import RunError
from promptkd.utils.files import write_json
from promptkd.utils.project import project_root
from promptkd.utils.strict_json import read_record


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: Its name in the record.
        command: The command, run in the project's root.
        products: Files or folders that exist when it is done.
        after: Names of the stages whose results it reads. If one of them changes, this one is repeated.
        imported: Whether products that something else made count as well, such as downloads.
    """

    name: str
    command: tuple[str, ...]
    products: tuple[Path, ...]
    after: tuple[str, ...] = ()
    imported: bool = False

    def __str__(self) -> str:
        return shlex.join(self.command)


class Record:
    """The finished stages, in a JSON file: name -> digest of its command and of the stages before it."""

    def __init__(self, path: Path, stages: Iterable[Stage]) -> None:
        self.path, self.digests = path, digests_of(stages)
        self.done: dict[str, str] = read_record(path, str, "delete the file to check every stage again")

    def is_done(self, stage: Stage) -> bool:
        """Whether a stage's products are complete."""
        exists = all(map(Path.exists, stage.products))
        return exists and (stage.imported or self.done.get(stage.name) == self.digests[stage.name])

    def add(self, stage: Stage) -> None:
        """Record a finished stage."""
        self.done[stage.name] = self.digests[stage.name]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.done)


def digests_of(stages: Iterable[Stage]) -> Mapping[str, str]:
    """Return the digest of each stage, which changes with its command and with the stages before it."""
    digests: dict[str, str] = {}
    for stage in stages:
        before = [digests[name] for name in stage.after if name in digests]
        digests[stage.name] = hashlib.sha256(json.dumps([stage.command, before]).encode()).hexdigest()
    return digests


def run_stages(stages: list[Stage], record: Record) -> None:
    """Run the stages that are not done.

    Raises:
        RunError: A command failed or was interrupted.
    """
    for place, stage in enumerate(stages, 1):
        title = f"== {place}/{len(stages)} {stage.name}"
        if record.is_done(stage):
            print(f"{title}: done before", flush=True)
            continue
        print(f"{title}: {stage}", flush=True)
        status = run_command(stage.command)
        if status:
            raise RunError(f"{stage.name} ended with status {status}: correct it, then run the same command again")
        if missing := next((path for path in stage.products if not path.exists()), None):
            raise RunError(f"{stage.name} ended before {missing} was written: run the same command again to resume")
        record.add(stage)


def run_command(command: tuple[str, ...]) -> int:
    """Run a command in the project's root and return its status.

    SIGINT and SIGTERM stop the command with SIGTERM, on which training writes a checkpoint, and then end this process.
    """
    environment = {**os.environ, "PROMPTKD_PYTHON": os.environ.get("PROMPTKD_PYTHON", sys.executable)}
    process = subprocess.Popen(command, cwd=project_root(), env=environment)
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        process.terminate()

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise SystemExit(128 + received[0])
    return status
