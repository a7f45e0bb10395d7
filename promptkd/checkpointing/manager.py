"""Checkpoints: whole or not there. Which one a run goes on from, and whether it may.

<save>/checkpoints/step-<N>/ holds, for each learner and rank, a safetensors file with masters and optimizer states
(the frozen teacher is not saved), the method's own tensors, state.json, and manifest.json with size and sha256 of
each file. It is written beside, synced and renamed. Nothing else is needed to go on: windows, seeds and sampling
noise are functions of the step.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from dataclasses import Field
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from promptkd.checkpointing.fingerprint import PARALLEL, RunFingerprint, _check_identity, _option
from promptkd.checkpointing.integrity import find_damage, read_state
from promptkd.checkpointing.optimizer_state import is_sharded, restore, saved_state, state_numbers, state_tensors
from promptkd.config.values import moment
from promptkd.distributed.ranks import Ranks
from promptkd.errors import RunError, UserError
from promptkd.methods.base import Method
from promptkd.training.metrics import read_metrics
from promptkd.utils.files import digest_of
from promptkd.utils.run_files import remove, sync_folder
from promptkd.weights.safetensors_io import TensorFile, write_tensors


class Checkpoints:
    """The checkpoints of a run's folder. All ranks hold one; the first one looks after the folder."""

    def __init__(self, run: Path, ranks: Ranks, keep: int, every: int, minutes: float) -> None:
        self.run, self.folder, self.ranks = run, run / "checkpoints", ranks
        self.keep, self.every, self.minutes = keep, every, minutes
        self.identity: RunFingerprint | None = None  # the first rank's
        self.declared: dict[str, Field] = {}  # likewise: the options that it holds
        self.lock: IO[str] | None = None  # the first rank's; held while open
        self.start: str | None = None  # the checkpoint that the run goes on from
        self.resumed: dict[str, Any] | None = None  # its numbers, once `read` has put its state back
        self.saved_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def is_late(self) -> bool:
        """Whether --checkpoint-minutes have passed, by the first rank's clock."""
        age = time.monotonic() - self.saved_at
        return self.ranks.is_main and 0 < self.minutes * 60 < age

    def write(self, step: int, method: Method, numbers: dict[str, Any]) -> None:
        """Write <save>/checkpoints/step-<step>; drop the oldest beyond --keep-checkpoints. All ranks call it.

        numbers: what the trainer wants back from `read`. Raises RunError when the disk is full or gone; earlier
        checkpoints are not touched before this one is whole.
        """
        place, beside = self.folder / f"step-{step}", self.folder / f".step-{step}.new"
        try:
            if self.ranks.is_main:
                self._sweep()
                self.folder.mkdir(exist_ok=True)  # the run's folder itself is not made again if it has vanished
                beside.mkdir()
            self.ranks.barrier()
            files = dict(self.ranks.world.all_gather_objects(self._write_tensors(beside, method)))
            if self.ranks.is_main:
                learners = {name: state_numbers(learner) for name, learner in method.learners().items()}
                state = {"step": step, "identity": vars(self.identity), "learners": learners, **numbers}
                state["method_tensors"] = sorted(method.state())
                _write_synced(beside / "state.json", state)
                files["state.json"] = digest_of(beside / "state.json")
                _write_synced(beside / "manifest.json", {"files": files})
                sync_folder(beside)
                _withdraw(place)  # a damaged one that was passed over
                beside.rename(place)
                sync_folder(self.folder)
                self.prune(self.keep)
        except OSError as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise RunError(
                f"checkpoint {place} cannot be written ({error.strerror}): the last whole one is kept"
            ) from None
        self.ranks.barrier()
        self.saved_at = time.monotonic()

    def _write_tensors(self, beside: Path, method: Method) -> list:
        written = []
        for name, learner in method.learners().items():
            if learner.dp_rank == 0 or is_sharded(learner):
                file = f"{name}-rank{self.ranks.world.dp_rank}.safetensors"
                written.append([file, write_tensors(beside / file, state_tensors(learner))])
        if self.ranks.tp_rank == 0 and (tensors := method.state()):
            file = f"method-rank{self.ranks.dp_rank}.safetensors"
            written.append([file, write_tensors(beside / file, tensors)])
        return written

    def unlock(self) -> None:
        """Let go of the folder; a run that ended before it wrote anything leaves none behind."""
        if self.lock is None:
            return
        if [path.name for path in self.run.glob("*")] == [".lock"]:
            shutil.rmtree(self.run, ignore_errors=True)
        self.lock.close()

    def read(self, method: Method) -> None:
        """Put the state of the checkpoint `start` into learners and method, its numbers into `resumed`.

        All ranks call it. Raises UserError when the checkpoint does not fit the run.
        """
        folder = self.folder / self.start
        try:
            state = read_state(folder)
            self._read_tensors(folder, state, method)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{folder} does not fit this run ({error}): --overwrite starts anew") from None
        self.resumed = state

    def _read_tensors(self, folder: Path, state: dict[str, Any], method: Method) -> None:
        learners = method.learners()
        if learners.keys() != state["learners"].keys():
            raise ValueError(f"state.json is of {', '.join(state['learners']) or 'no learner'}")
        for key, learner in learners.items():
            ranks = state["identity"]["ranks"] * self.ranks.tp_size if is_sharded(learner) else learner.tp_size
            same_part = range(self.ranks.world.dp_rank % learner.tp_size, ranks, learner.tp_size)
            files = [TensorFile(folder / f"{key}-rank{rank}.safetensors") for rank in same_part]
            restore(learner, saved_state(learner, files), state["learners"][key])
        if names := state["method_tensors"]:
            own = TensorFile(folder / f"method-rank{self.ranks.dp_rank}.safetensors")
            try:
                method.load_state({name: own[name] for name in names})
            except RuntimeError as error:  # lengths that do not fit each other
                raise ValueError(f"the method's own state: {error}") from None

    def newest(self) -> tuple[str, dict[str, Any]] | None:
        """Name and state.json of the newest whole checkpoint. Damaged ones are named on stderr and passed over."""
        damaged = []
        for name in self._names():
            problem = find_damage(self.folder / name)
            if problem is None:
                for line in damaged:
                    print(f"checkpoint {self.folder}/{line}: passed over", file=sys.stderr, flush=True)
                return name, read_state(self.folder / name)
            damaged.append(f"{name} is damaged ({problem})")
        if damaged:
            raise UserError(f"no checkpoint in {self.folder} is whole: {damaged[0]}: --overwrite starts anew")
        return None

    def prune(self, keep: int) -> None:
        """Keep the newest `keep` checkpoints."""
        if self.ranks.is_main:
            for name in self._names()[keep:]:
                _withdraw(self.folder / name)

    def _names(self) -> list[str]:
        """Newest first."""
        names = [path.name for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d{1,12}", path.name)]
        return sorted(names, key=lambda name: -int(name[5:]))

    def _sweep(self) -> None:
        """Remove what a kill left half written or half removed."""
        for path in [*self.folder.glob(".step-*.new"), *self.folder.glob(".step-*.old")]:
            remove(path)


def _withdraw(folder: Path) -> None:
    """Remove a checkpoint so that a kill cannot leave half of one under its name."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def _write_synced(path: Path, content: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def recorded_time(run: Path) -> str | None:
    """The time that the chat template of an interrupted run wrote, by its newest checkpoint; None where there is none.

    Whether that checkpoint can be used is for `select_checkpoint` to say, which comes later.
    """
    steps = [int(path.name[5:]) for path in run.glob("checkpoints/step-*") if re.fullmatch(r"step-\d{1,12}", path.name)]
    try:
        state = read_state(run / "checkpoints" / f"step-{max(steps, default=0)}")
        return moment(str(state["identity"]["options"].get("template_time")))
    except (OSError, ValueError, argparse.ArgumentTypeError):
        return None


def select_checkpoint(checkpoints: Checkpoints, run) -> str | None:
    """On the first rank: the checkpoint to go on from as --resume says, or None to start anew.

    Raises UserError when there is nothing to go on from (--resume) or when what decides the numbers differs
    (unless --resume-anyway). Writes nothing.
    """
    found = checkpoints.newest() if run.resume != "never" else None
    if found is None:
        if run.resume == "must":
            raise UserError(f"--resume: {checkpoints.folder} holds no checkpoint: --resume auto starts anew then")
        return None
    name, state = found
    now, then = checkpoints.identity, state["identity"]
    if now.ranks != then["ranks"]:
        own = (checkpoints.folder / name / "method-rank0.safetensors").exists()
        if own or now.options["loss_normalization"] == "micro-batch":
            raise UserError(f"--resume: {name} is of {then['ranks']} ranks, these are {now.ranks}: start as many")
    sizes = [[options.get(key) for key in PARALLEL] for options in (now.options, then["options"])]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"--resume: {name} is of other model parallel sizes: give {_option(PARALLEL[0])} as it was made"
        )
    _check_identity(now.differences(then, checkpoints.declared), name, run.resume_anyway)
    if now.ranks != then["ranks"]:
        print(f"{name} is of {then['ranks']} ranks, these are {now.ranks}: goes on, not bitwise", file=sys.stderr)
    read_metrics(checkpoints.run / "metrics.jsonl", state["metrics_bytes"])
    return name
