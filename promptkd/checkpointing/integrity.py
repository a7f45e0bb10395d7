"""Whether a checkpoint on disk is whole: every file as its manifest says, and a state.json that a run can use.

Checksums show damage, not forgery; so all that is read from state.json is checked for its kind, too. Tensors are
checked against the run's own when they are put back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from promptkd.engine.loss_scale import LOSS_SCALE
from promptkd.errors import UserError
from promptkd.utils.files import digest_of
from promptkd.utils.strict_json import check_kind, read_object

INPUT = {"path": str, "files": int, "bytes": int, "sha256_of_ends": str}
OPTIONS = {"batch_size": int, "gradient_accumulation_steps": int}
LEARNER = {
    "stage": int,
    "groups": [{...: (float, bool)}],
    "schedule": {"last_epoch": int, "_step_count": int, "_last_lr": [float]},
    "counters": {"global_steps": int, "global_samples": int, "micro_steps": int, "skipped_steps": int},
    "loss_scale": {...: float},
}
STATE = {
    "step": int,
    "best": {...: float},
    "skipped": int,
    "metrics_bytes": int,
    "method_tensors": [str],
    "learners": {...: LEARNER},
    "identity": {"options": OPTIONS, "deepspeed": {...: object}, "inputs": {...: (INPUT, None)}, "ranks": int},
}


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint, checked. Raises ValueError that says what is wrong."""
    state = _read_object(folder / "state.json")
    check_kind(state, STATE, "state.json")
    if folder.name != f"step-{state['step']}":
        raise ValueError(f"state.json is of step {state['step']}")
    if state["metrics_bytes"] < 0 or state["skipped"] < 0 or state["identity"]["ranks"] < 1:
        raise ValueError("state.json counts below nothing")
    for learner in state["learners"].values():
        if unknown := learner["loss_scale"].keys() - set(LOSS_SCALE):
            raise ValueError(f"state.json has a loss scale with {min(unknown)!r}")
    return state


def find_damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None: sizes and sha256 by the manifest, then state.json."""
    try:
        files = _read_object(folder / "manifest.json").get("files")
        check_kind(files, {...: {"bytes": int, "sha256": str}}, "manifest.json, files")
        if files.keys() | {"manifest.json"} != {path.name for path in folder.iterdir()} or "state.json" not in files:
            return "files are missing or too many"
        for name, entry in files.items():
            if (folder / name).is_symlink() or not (folder / name).is_file():
                return f"{name} is no file of its own"
            if (folder / name).stat().st_size != entry["bytes"]:
                return f"{name} has another size than the manifest says"
            if digest_of(folder / name) != entry:
                return f"{name} has another checksum than the manifest says"
        _check_files(read_state(folder), files)
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except ValueError as error:
        return str(error)
    return None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, "")
    except UserError as error:
        raise ValueError(str(error).removeprefix(f"{path.parent}/").rstrip(": ")) from None


def _check_files(state: dict[str, Any], files: dict[str, Any]) -> None:
    """Raise ValueError unless each learner's first file is there; who reads the others knows how many there are."""
    for name in state["learners"]:
        if f"{name}-rank0.safetensors" not in files:
            raise ValueError(f"{name}-rank0.safetensors is missing")
