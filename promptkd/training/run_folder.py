"""The run's folder: models and prompts that are complete or absent, and the run's own record."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from promptkd.data.prompt_format import RECORD, PromptFormat
from promptkd.engine.engine import TrainEngine
from promptkd.errors import RunError, UserError
from promptkd.models.adapters import merged_state, save_adapter
from promptkd.utils.files import atomic_folder, fingerprint, remove, write_json
from promptkd.utils.project import PACKAGE

# Best-checkpoint folder -> metric -> +1 if higher is better, -1 if lower is better. The second metric breaks ties.
BEST_METRICS = {"best_rougeL": {"rougeL": 1, "dev_loss": -1}, "best_loss": {"dev_loss": -1}}
PACKAGES = ("torch", "transformers", "deepspeed", "peft", "numpy", "safetensors")


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """Write a folder of the run atomically, see `atomic_folder`.

    Raises:
        RunError: The disk is full, or the run's folder is gone. What was in `folder` stays.
    """
    try:
        with atomic_folder(folder) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:  # safetensors raises its own error when the disk is full
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{folder} cannot be written ({reason}): make room and start it again with --resume") from None


def check_vacant(folder: Path, overwrite: bool, interrupted: bool) -> None:
    """Raise UserError where the folder holds a run that may not be replaced.

    Args:
        folder: The run's folder.
        overwrite: Whether --overwrite was given.
        interrupted: Whether an unfinished run may be replaced. With --resume auto, a kill may have come before the
            first checkpoint.
    """
    metrics = folder / "metrics.jsonl"
    if not os.path.lexists(metrics):
        return
    if not metrics.is_file():
        raise UserError(f"--save {folder}: metrics.jsonl in it is not a file: remove it, or name another folder")
    if not overwrite and not (interrupted and not (folder / "last").exists()):
        raise UserError(
            f"--save {folder} already holds a run: --resume continues it, --overwrite replaces it, "
            "--save names another folder"
        )


def check_inputs(folder: Path, inputs: Iterable[str | None]) -> None:
    """Raise UserError if a new run would replace what it reads, such as the model of the run that was there before."""
    own = [path.resolve() for path in _own_folders(folder)]
    for name in filter(None, inputs):
        if any(Path(name).resolve().is_relative_to(path) for path in own):
            raise UserError(f"--save {folder}: the run would replace {name}, which it reads: name another folder")


def _own_folders(folder: Path) -> list[Path]:
    """Return the folders that runs and their evaluations write into a run's folder."""
    best = (f"{name}{kind}" for name in BEST_METRICS for kind in ("", "_prompt"))
    return [folder / name for name in ("last", "prompt", *best, "eval", "exposure_bias", "tensorboard", "checkpoints")]


def clear_folder(folder: Path) -> None:
    """Remove the files of an earlier run except config.json, which the new run has written already."""
    if not (folder / "metrics.jsonl").exists():
        return
    for name in ("curves.png", "memory.json", "profile.md", "trace.json.gz"):
        (folder / name).unlink(missing_ok=True)
    for path in _own_folders(folder):
        remove(path)
    (folder / "metrics.jsonl").unlink()  # last: until then the folder counts as taken


def best_model(folder: Path) -> Path:
    """Return the folder of a run's best model: the first of BEST_METRICS that holds weights, else the last model."""
    return next((folder / name for name in BEST_METRICS if any((folder / name).glob("*.safetensors"))), folder / "last")


def save_model(learner: TrainEngine, tokenizer, folder: Path, prompts: PromptFormat, merge: bool = False) -> None:
    """Write the model or its LoRA adapters as a folder, with the tokenizer and a record of the prompts' format.

    With `merge`, adapters are merged into a complete model. All ranks call it. The first one writes.
    """
    model = learner.module.model
    with learner.gathered_model() if merge else contextlib.nullcontext():
        state = merged_state(model) if merge else learner.model_state()
        if learner.ranks.is_main:
            with output_folder(folder) as temporary:
                if hasattr(model, "peft_config") and not merge:
                    save_adapter(model, state, temporary)
                else:
                    model.save_pretrained(temporary, state_dict=state)
                tokenizer.save_pretrained(temporary)
                write_json(temporary / RECORD, prompts.as_dict())
        learner.ranks.barrier()


def describe_run(settings: dict[str, Any], inputs: dict[str, str | None]) -> dict[str, Any]:
    """Return the content of config.json: settings, versions, commit and fingerprints of the inputs."""
    return {
        "settings": settings,
        "commit": commit_of(PACKAGE.parent),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "inputs": {name: {"path": path, **fingerprint(path)} for name, path in inputs.items() if path},
    }


def commit_of(root: Path) -> str | None:
    """Return the commit of a working tree, or None without git or a repository."""
    try:
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        done = subprocess.run(describe, capture_output=True, encoding="utf-8", errors="replace")
    except OSError:
        return None
    return done.stdout.strip() or None
