"""Folders that are whole or not there: models, prompts, the run's own record."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from promptkd.data.prompt_format import RECORD, PromptFormat
from promptkd.engine import Learner
from promptkd.errors import RunError, UserError

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


def remove(path: Path) -> None:
    """Remove a folder and all in it, or a file or link of that name. What cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a folder beside its place, then put it there in one move, replacing what was there.

    The folder around it has to be there. Raises RunError when it is not, or the disk is full: what was there stays.
    """
    beside, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old"))
    for leftover in (beside, old):
        remove(leftover)
    try:
        beside.mkdir()
        fill(beside)
        for path in beside.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        sync_folder(beside)
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
        sync_folder(folder.parent)  # a checkpoint written after this may speak of it
    except (OSError, SafetensorError) as error:  # safetensors' writer has errors of its own for a full disk
        shutil.rmtree(beside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{folder} cannot be written ({reason}): make room and start it again with --resume") from None
    shutil.rmtree(old, ignore_errors=True)


def save_model(learner: Learner, tokenizer, folder: Path, prompts: PromptFormat) -> None:
    """Write the model as a Hugging Face folder with its tokenizer and a record of how training's prompts were made.

    All ranks call it; the first one writes.
    """
    model = learner.module.model
    state = learner.model_state()
    if learner.ranks.first:

        def fill(beside: Path) -> None:
            model.save_pretrained(beside, state_dict=state)
            tokenizer.save_pretrained(beside)
            write_json(beside / RECORD, prompts.as_dict())

        write_folder(folder, fill)
    learner.ranks.barrier()


def describe_run(settings: dict[str, Any], inputs: dict[str, str]) -> dict[str, Any]:
    """What config.json holds: settings, versions, commit, fingerprints of what was read."""
    root = Path(__file__).parents[1]
    describe = ["git", "-C", root, "describe", "--always", "--dirty"]
    git = subprocess.run(describe, capture_output=True, encoding="utf-8", errors="replace")
    return {
        "settings": settings,
        "commit": git.stdout.strip() or None,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "inputs": {name: {"path": path, **fingerprint(path)} for name, path in inputs.items() if path},
    }


def fingerprint(path: str) -> dict[str, Any]:
    """Names, sizes and the ends' bytes of a folder's files in one digest: cheap, and changes when they do."""
    digest, total = hashlib.sha256(), 0
    files = sorted(
        file for pattern in ("*", "mp*/*", "*/*.arrow") for file in Path(path).glob(pattern) if file.is_file()
    )
    for file in files:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            head = stream.read(1 << 16)
            stream.seek(max(size - (1 << 16), 0))
            digest.update(f"{file.name}:{size}:".encode() + head + stream.read())
        total += size
    return {"files": len(files), "bytes": total, "sha256_of_ends": digest.hexdigest()}


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one move. Raises OSError as the file system does; then nothing is left behind."""
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError:
        remove(beside)
        raise
