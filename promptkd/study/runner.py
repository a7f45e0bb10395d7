"""Run the grid: several commands at a time, each kept when it is done, resumed after an interruption."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from promptkd.errors import RunError
from promptkd.reproduction.stages import Record, Stage
from promptkd.study.declaration import Study
from promptkd.study.grid import Grid
from promptkd.study.process import Job
from promptkd.utils.files import lock_folder, write_json
from promptkd.utils.progress import Progress
from promptkd.utils.strict_json import read_record

BEGUN = "begun "  # in front of the names of stages that were started, in the record


class Runner:
    """Run the stages of a study.

    Args:
        study: The study.
        parallel: Number of commands at a time.
        only: Name of the stage to run, None for all.
    """

    def __init__(self, study: Study, parallel: int, only: str | None = None) -> None:
        self.study, self.parallel, self.only = study, parallel, only
        self.record_path, self.seconds_path = study.save / "stages.json", study.save / "seconds.json"
        self.seconds = read_seconds(self.seconds_path)
        self.jobs: list[tuple[Job, Stage]] = []
        self.digests: dict[str, str] = {}  # of the running stages, when they were started
        self.stopped: list[int] = []

    def run(self) -> None:
        """Run all stages that are not done.

        Raises:
            RunError: A command failed. The others that were running have been finished.
            SystemExit: SIGINT or SIGTERM was received. The commands got SIGTERM, on which training writes a checkpoint.
        """
        lock = lock_folder(self.study.save)
        handled = (signal.SIGINT, signal.SIGTERM)
        before: dict[int, Any] = {number: signal.signal(number, self._stop) for number in handled}
        try:
            self._loop()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            lock.release()

    def _loop(self) -> None:
        failure = ""
        first = self.state()
        progress = Progress("study", first.total, True, unit="command", done=len(first.done))
        while True:
            state = self.state()
            running = {stage.name for _, stage in self.jobs}
            free = [stage for stage in state.ready if stage.name not in running]
            if not (failure or self.stopped):
                for stage in free[: self.parallel - len(self.jobs)]:
                    self._start(stage, state.record)
            if not self.jobs:
                break
            for job, stage in self._wait():
                failure = self._finish(job, stage, state.record) or failure
                progress.total = max(state.total, progress.done + 1)
                progress.update(values={"running": len(self.jobs)})
        progress.close()
        if self.stopped:
            raise SystemExit(128 + self.stopped[0])
        if failure:
            raise RunError(failure)

    def state(self) -> State:
        """Read which stages are done, and which can be started."""
        return read_state(self.study, self.record_path, self.seconds, self.only)

    def _start(self, stage: Stage, record: Record) -> None:
        digest, key = record.digests[stage.name], BEGUN + stage.name
        self.digests[stage.name] = digest
        if record.done.get(key) != digest:  # What is in the folder comes from other settings.
            for folder in (product.parent for product in stage.products):
                if folder.is_dir() and self.study.save in folder.parents:
                    shutil.rmtree(folder)
            self.seconds.pop(stage.name, None)
            record.done[key] = digest
            write_json(self.record_path, record.done)
        log = self.study.save / "logs" / f"{stage.name.replace('/', '.')}.log"
        self.jobs.append((Job(stage.name, stage.command, log), stage))

    def _wait(self) -> list[tuple[Job, Stage]]:
        """Wait until a command ends. Return the ended ones, and count their CPU time."""
        wait([job.process.sentinel for job, _ in self.jobs])
        ended = [pair for pair in self.jobs if pair[0].process.exitcode is not None]
        self.jobs = [pair for pair in self.jobs if pair not in ended]
        for job, _ in ended:
            self.seconds[job.name] = round(self.seconds.get(job.name, 0.0) + job.cpu_seconds(), 2)
        write_json(self.seconds_path, self.seconds)
        return ended

    def _finish(self, job: Job, stage: Stage, record: Record) -> str:
        """Record a command that ended, or return what is wrong."""
        if job.process.exitcode:
            status = f"ended with status {job.process.exitcode}"
            return "" if self.stopped else f"{stage.name} {status}: see {job.log}, then run the same command again"
        if missing := next((path for path in stage.products if not path.exists()), None):
            return f"{stage.name} ended without {missing}: see {job.log}"
        if record.digests.get(stage.name) == self.digests.pop(stage.name):  # else its settings changed meanwhile
            record.add(stage)
        return ""

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self.stopped.append(number)
        for job, _ in self.jobs:
            job.process.terminate()


@dataclass(frozen=True)
class State:
    """How far a study is.

    Attributes:
        done: Names of the finished stages among those that are known now.
        ready: Stages whose earlier ones are done.
        total: Number of the stages that are known now.
    """

    grid: Grid
    record: Record
    done: set[str]
    ready: list[Stage]
    total: int


def read_state(study: Study, path: Path, seconds: dict[str, float], only: str | None = None) -> State:
    """Read the record, and find the stages whose settings the finished ones determine.

    A stage counts as done only with the command that it has now, and the choice of a rate depends on finished runs.
    Therefore, the search is repeated until nothing changes.
    """
    done: set[str] = set()
    while True:
        grid = Grid(study, seconds, done)
        stages = list(grid.stages(only))
        record = Record(path, stages)
        now = {stage.name for stage in stages if record.is_done(stage)}
        if now <= done:
            ready = [stage for stage in stages if stage.name not in now and _is_free(stage, now)]
            return State(grid, record, now, ready, len(stages))
        done |= now


def _is_free(stage: Stage, done: Iterable[str]) -> bool:
    return all(name in done for name in stage.after)


def read_seconds(path: Path) -> dict[str, float]:
    """Read the CPU seconds of finished stages."""
    return read_record(path, float, "delete the file to measure again")
