"""Folders that are whole or not there: models, prompts, the run's own record."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import stat
import subprocess
from pathlib import Path
from typing import IO, Any

from promptkd.data.prompt_format import RECORD, PromptFormat
from promptkd.engine.engine import TrainEngine
from promptkd.errors import UserError
from promptkd.utils.project import PACKAGE
from promptkd.utils.run_files import fingerprint, remove, write_folder, write_json

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "numpy", "safetensors")


def lock_folder(folder: Path) -> IO[str]:
    """Make the run's folder and lock it: for as long as the returned file is open, and not after a crash.

    Raises UserError when the folder cannot be made or another run has it.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"--save {folder} is a file: name a folder")
    if os.path.lexists(folder / ".lock") and not stat.S_ISREG(os.lstat(folder / ".lock").st_mode):
        raise UserError(f"--save {folder}: .lock in it is no file: remove it, or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a", encoding="utf-8")  # noqa: SIM115 - to be held
    except OSError as error:
        raise UserError(f"--save {folder} cannot be made ({error.strerror}): name another folder") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"--save {folder} is in use by another run: name another folder") from None
    return lock


def check_vacant(folder: Path, overwrite: bool, interrupted: bool) -> None:
    """Raise UserError when there is a run already that may not be replaced.

    overwrite: --overwrite was given. interrupted: an unfinished run may be replaced too (--resume auto after a kill
    that came before the first checkpoint).
    """
    metrics = folder / "metrics.jsonl"
    if not os.path.lexists(metrics):
        return
    if not metrics.is_file():
        raise UserError(f"--save {folder}: metrics.jsonl in it is no file: remove it, or name another folder")
    if not overwrite and not (interrupted and not (folder / "last").exists()):
        raise UserError(
            f"--save {folder} already holds a run: --resume goes on with it, --overwrite replaces it, "
            "--save names another folder"
        )


def clear_folder(folder: Path) -> None:
    """Remove what an earlier run left but its config.json, to make room for a new one."""
    if not (folder / "metrics.jsonl").exists():
        return
    for name in ("curves.png", "memory.json", "profile.md", "trace.json.gz"):
        (folder / name).unlink(missing_ok=True)
    best = ("best_rougeL", "best_rougeL_prompt", "best_loss", "best_loss_prompt")
    for name in ("last", "prompt", *best, "eval", "exposure_bias", "checkpoints"):
        remove(folder / name)
    (folder / "metrics.jsonl").unlink()  # the last: until then the folder counts as taken


def save_model(learner: TrainEngine, tokenizer, folder: Path, prompts: PromptFormat) -> None:
    """Write the model as a Hugging Face folder with its tokenizer and a record of how training's prompts were made.

    All ranks call it; the first one writes.
    """
    model = learner.module.model
    state = learner.model_state()
    if learner.ranks.is_main:

        def fill(beside: Path) -> None:
            model.save_pretrained(beside, state_dict=state)
            tokenizer.save_pretrained(beside)
            write_json(beside / RECORD, prompts.as_dict())

        write_folder(folder, fill)
    learner.ranks.barrier()


def describe_run(settings: dict[str, Any], inputs: dict[str, str | None]) -> dict[str, Any]:
    """What config.json holds: settings, versions, commit, fingerprints of what was read."""
    return {
        "settings": settings,
        "commit": commit_of(PACKAGE.parent),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "inputs": {name: {"path": path, **fingerprint(path)} for name, path in inputs.items() if path},
    }


def commit_of(root: Path) -> str | None:
    """Return the commit of a working tree; None where there is no git or no repository."""
    try:
        describe = ["git", "-C", root, "describe", "--always", "--dirty"]
        done = subprocess.run(describe, capture_output=True, encoding="utf-8", errors="replace")
    except OSError:
        return None
    return done.stdout.strip() or None
