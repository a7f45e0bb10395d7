"""Write a run's checkpoints, and find the one that a run resumes from.

<save>/checkpoints/step-<N>/ holds a safetensors file with master weights and optimizer states for each engine and
rank, the method's own tensors, state.json, and manifest.json with the size and checksum of each file. The frozen
teacher is not saved. Batches, seeds and sampling noise are functions of the step, so that a run needs nothing else.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import time
from dataclasses import Field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from safetensors import SafetensorError

from promptkd import __version__
from promptkd.checkpointing.fingerprint import PARALLEL, RunFingerprint, check_differences, option_name
from promptkd.checkpointing.integrity import LAYOUT, learner_file, read_state, verified_state, writer_of
from promptkd.checkpointing.optimizer_state import is_sharded, restore, saved_state, state_numbers, state_tensors
from promptkd.config.options import RunSettings
from promptkd.config.values import moment
from promptkd.distributed.ranks import Ranks
from promptkd.errors import RunError, UserError
from promptkd.utils.files import digest_of, remove, replace_folder, write_json
from promptkd.utils.jsonl import read_metrics
from promptkd.weights.safetensors_io import TensorFile, write_tensors

if TYPE_CHECKING:
    from promptkd.methods.base import Method


class Checkpoints:
    """The checkpoints in a run's folder. All ranks hold one object; the first rank manages the folder.

    Args:
        run: The run's folder.
        ranks: The ranks of the run.
        keep: How many checkpoints to keep.
        every: Steps between checkpoints; 0 for none by step.
        minutes: Age of the last checkpoint after which one is due; 0 for none by age.

    Attributes:
        identity: The run's fingerprint, on the first rank.
        declared: The run's options, on the first rank.
        lock: The folder's lock while it is held, on the first rank.
        start: Name of the checkpoint that the run resumes from.
        resumed: Its state.json, once `load` has restored it.
    """

    def __init__(self, run: Path, ranks: Ranks, keep: int, every: int, minutes: float) -> None:
        self.run, self.folder, self.ranks = run, run / "checkpoints", ranks
        self.keep, self.every, self.minutes = keep, every, minutes
        self.identity: RunFingerprint | None = None
        self.declared: dict[str, Field] = {}
        self.lock: FileLock | None = None
        self.start: str | None = None
        self.resumed: dict[str, Any] | None = None
        self.saved_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Return whether --checkpoint-every asks for a checkpoint after a step."""
        return self.every > 0 and step % self.every == 0

    def is_late(self) -> bool:
        """Return whether --checkpoint-minutes have passed, by the first rank's clock."""
        age = time.monotonic() - self.saved_at
        return self.ranks.is_main and 0 < self.minutes * 60 < age

    def write(self, step: int, method: Method, numbers: dict[str, Any]) -> None:
        """Write <save>/checkpoints/step-<step>, and drop the oldest beyond --keep-checkpoints. All ranks call it.

        Args:
            step: The step that was just taken.
            method: The method, with its engines.
            numbers: What the trainer needs in `resumed`.

        Raises:
            RunError: The disk is full or gone. Earlier checkpoints stay until this one is complete.
        """
        folder, temporary = self.folder / f"step-{step}", self.folder / f".step-{step}.new"
        try:
            if self.ranks.is_main:
                self._sweep()
                self.folder.mkdir(exist_ok=True)  # without parents: the run's folder is not made again if it vanished
                temporary.mkdir()
            self.ranks.barrier()
            files = dict(self.ranks.world.all_gather_objects(self._write_tensors(temporary, method)))
            if self.ranks.is_main:
                learners = {name: state_numbers(learner) for name, learner in method.learners().items()}
                state = {"layout": LAYOUT, "version": __version__, "step": step, "identity": vars(self.identity)}
                state |= {"learners": learners, "method_tensors": sorted(method.state()), **numbers}
                write_json(temporary / "state.json", state)
                files["state.json"] = digest_of(temporary / "state.json")
                write_json(temporary / "manifest.json", {"files": files})
                replace_folder(temporary, folder)  # a damaged checkpoint may be there
                self.prune(self.keep)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(
                f"checkpoint {folder} cannot be written ({error.strerror}): make room and resume from the one before it"
            ) from None
        self.ranks.barrier()
        self.saved_at = time.monotonic()

    def _write_tensors(self, folder: Path, method: Method) -> list[list[Any]]:
        """Write this rank's files. Return their names and digests."""
        written: list[list[Any]] = []
        for name, learner in method.learners().items():
            if learner.dp_rank == 0 or is_sharded(learner):
                file = learner_file(LAYOUT, name, self.ranks.world.dp_rank)
                written.append([file, write_tensors(folder / file, state_tensors(learner))])
        if self.ranks.tp_rank == 0 and (tensors := method.state()):
            file = f"method-rank{self.ranks.dp_rank}.safetensors"
            written.append([file, write_tensors(folder / file, tensors)])
        return written

    def unlock(self) -> None:
        """Release the folder. Remove it if the run ended before it wrote anything."""
        if self.lock is None:
            return
        if [path.name for path in self.run.glob("*")] == [".lock"]:
            shutil.rmtree(self.run, ignore_errors=True)
        self.lock.release()

    def load(self, method: Method) -> None:
        """Restore engines and method from the checkpoint `start`, and read its numbers into `resumed`.

        All ranks call it.

        Raises:
            UserError: The checkpoint does not fit the run.
        """
        if self.start is None:
            raise ValueError("no checkpoint is selected")
        folder = self.folder / self.start
        try:
            state = read_state(folder)
            self._load_tensors(folder, state, method)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{folder} does not fit this run ({error}): --overwrite starts a new run") from None
        self.resumed = state

    def _load_tensors(self, folder: Path, state: dict[str, Any], method: Method) -> None:
        learners = method.learners()
        if learners.keys() != state["learners"].keys():
            names = ", ".join(state["learners"]) or "no engine"
            raise ValueError(f"state.json of {writer_of(state)} is of {names}, the run has {', '.join(learners)}")
        for name, learner in learners.items():
            ranks = state["identity"]["ranks"] * self.ranks.tp_size if is_sharded(learner) else learner.tp_size
            same_part = range(self.ranks.world.dp_rank % learner.tp_size, ranks, learner.tp_size)
            files = [TensorFile(folder / learner_file(state["layout"], name, rank)) for rank in same_part]
            restore(learner, saved_state(learner, files), state["learners"][name])
        if names := state["method_tensors"]:
            tensors = TensorFile(folder / f"method-rank{self.ranks.dp_rank}.safetensors")
            try:
                method.load_state({name: tensors[name] for name in names})
            except RuntimeError as error:  # lengths that do not fit each other
                raise ValueError(f"the method's own state: {error}") from None

    def latest_valid(self) -> tuple[str, dict[str, Any]] | None:
        """Return name and state of the newest intact checkpoint. Damaged ones are reported on stderr and skipped.

        Raises:
            UserError: There are checkpoints, and all are damaged or of a newer version.
        """
        damaged = []
        for name in self._names():
            try:
                state = verified_state(self.folder / name)
            except ValueError as error:
                damaged.append(f"{name} is damaged ({error})")
                continue
            for line in damaged:
                print(f"checkpoint {self.folder}/{line}: skipped", file=sys.stderr, flush=True)
            return name, state
        if damaged:
            raise UserError(f"no checkpoint in {self.folder} is intact: {damaged[0]}: --overwrite starts a new run")
        return None

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` checkpoints."""
        if self.ranks.is_main:
            for name in self._names()[keep:]:
                # Renamed first: a kill must not leave half of a checkpoint under its name.
                remove((self.folder / name).rename(self.folder / f".{name}.old"))

    def _names(self) -> list[str]:
        """Return the names of all checkpoints, newest first."""
        return _checkpoint_names(self.folder)

    def _sweep(self) -> None:
        """Remove what a kill left half written or half removed."""
        for path in [*self.folder.glob(".step-*.new"), *self.folder.glob(".step-*.old")]:
            remove(path)


def _checkpoint_names(folder: Path) -> list[str]:
    """Return the names of the checkpoints in a folder, newest first."""
    names = [path.name for path in folder.glob("step-*") if re.fullmatch(r"step-\d{1,12}", path.name)]
    return sorted(names, key=lambda name: -int(name[5:]))


def recorded_time(run: Path) -> str | None:
    """Return the time in the prompts of an interrupted run, from its newest checkpoint, or None without one.

    `select_checkpoint` decides later whether that checkpoint can be used.
    """
    try:
        state = read_state(run / "checkpoints" / next(iter(_checkpoint_names(run / "checkpoints")), ""))
        return moment(str(state["identity"]["options"].get("template_time")))
    except (OSError, ValueError, UserError, argparse.ArgumentTypeError):
        return None


def select_checkpoint(checkpoints: Checkpoints, run: RunSettings) -> str | None:
    """Return the checkpoint to resume from, or None for a new run. The first rank calls it. It writes nothing.

    Raises:
        UserError: --resume finds no checkpoint, or settings that change the numbers differ and --resume-anyway is not
            given.
    """
    latest = checkpoints.latest_valid() if run.resume != "never" else None
    if latest is None:
        if run.resume == "must":
            raise UserError(f"--resume: {checkpoints.folder} holds no checkpoint: --resume auto starts a new run then")
        return None
    name, state = latest
    current, saved = checkpoints.identity, state["identity"]
    if current is None:
        raise ValueError("the run's fingerprint is not set")
    if current.ranks != saved["ranks"]:
        has_method_state = (checkpoints.folder / name / "method-rank0.safetensors").exists()
        if has_method_state or current.options["loss_normalization"] == "micro-batch":
            raise UserError(
                f"--resume: {name} is of {saved['ranks']} ranks, these are {current.ranks}: start {saved['ranks']}"
            )
    if [current.options.get(key) for key in PARALLEL] != [saved["options"].get(key) for key in PARALLEL]:
        option = option_name(PARALLEL[0])
        raise UserError(f"--resume: {name} has other model parallel sizes: give {option} as in that run")
    check_differences(current.differences(saved, checkpoints.declared), name, run.resume_anyway)
    if current.ranks != saved["ranks"]:
        print(f"{name} is of {saved['ranks']} ranks, these are {current.ranks}: resumes, not bitwise", file=sys.stderr)
    read_metrics(checkpoints.run / "metrics.jsonl", state["metrics_bytes"])
    return name
