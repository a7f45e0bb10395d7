"""Check a checkpoint on disk: every file matches its manifest, and a run can use its state.json.

Checksums show damage but not forgery, so the kind of each value in state.json is checked, too. Tensors are checked
against the run's own when they are restored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from promptkd import __version__
from promptkd.engine.loss_scale import LOSS_SCALE
from promptkd.errors import UserError
from promptkd.utils.files import digest_of
from promptkd.utils.strict_json import check_kind, is_kind, read_object

# Layout 1 has neither "layout" nor "version" in state.json, and calls the prompt's engine "teacher".
LAYOUT = 2
OLD_NAMES = {1: {"prompt": "teacher"}}  # layout -> engine -> its name on disk

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
    """Read and check a checkpoint's state.json. The engines get the names of this version's layout.

    Raises:
        UserError: A newer version wrote the checkpoint.
        ValueError: A value is missing or wrong.
    """
    state = _read_object(folder / "state.json")
    layout = state.setdefault("layout", 1)
    if is_kind(layout, int) and layout > LAYOUT:
        raise UserError(
            f"{folder} was written by {writer_of(state)}, and promptkd {__version__} cannot read its layout: "
            "resume it with that version, or pass --overwrite to start a new run"
        )
    check_kind(state, STATE | {"layout": int}, f"state.json of {writer_of(state)}")
    if folder.name != f"step-{state['step']}":
        raise ValueError(f"state.json is of step {state['step']}")
    if state["metrics_bytes"] < 0 or state["skipped"] < 0 or state["identity"]["ranks"] < 1 or layout < 1:
        raise ValueError("state.json has a negative count")
    for learner in state["learners"].values():
        if unknown := learner["loss_scale"].keys() - set(LOSS_SCALE):
            raise ValueError(f"state.json has a loss scale with {min(unknown)!r}")
    for name, old_name in OLD_NAMES.get(layout, {}).items():
        if old_name in state["learners"]:
            state["learners"][name] = state["learners"].pop(old_name)
    return state


def writer_of(state: dict[str, Any]) -> str:
    """Return the version that wrote a checkpoint, for messages."""
    return f"promptkd {str(state['version'])[:32]}" if "version" in state else "promptkd 0.1.0 or older"


def learner_file(layout: int, name: str, rank: int) -> str:
    """Return the file name of an engine's tensors in a checkpoint of a layout."""
    return f"{OLD_NAMES.get(layout, {}).get(name, name)}-rank{rank}.safetensors"


def verified_state(folder: Path) -> dict[str, Any]:
    """Check a checkpoint's sizes and checksums against its manifest, then return its state, see `read_state`.

    Raises:
        UserError: A newer version wrote the checkpoint.
        ValueError: The checkpoint is damaged.
    """
    try:
        files: Any = _read_object(folder / "manifest.json").get("files")
        check_kind(files, {...: {"bytes": int, "sha256": str}}, "manifest.json, files")
        if files.keys() | {"manifest.json"} != {path.name for path in folder.iterdir()} or "state.json" not in files:
            raise ValueError("files are missing or too many")
        for name, entry in files.items():
            if (folder / name).is_symlink() or not (folder / name).is_file():
                raise ValueError(f"{name} is not a regular file")
            if (folder / name).stat().st_size != entry["bytes"]:
                raise ValueError(f"{name} has another size than the manifest says")
            if digest_of(folder / name) != entry:
                raise ValueError(f"{name} has another checksum than the manifest says")
    except OSError as error:
        raise ValueError(f"{Path(error.filename or folder).name}: {error.strerror}") from None
    state = read_state(folder)
    for learner in state["learners"]:  # who reads the files of other ranks knows how many there are
        if (file := learner_file(state["layout"], learner, 0)) not in files:
            raise ValueError(f"{file} is missing")
    return state


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, "")
    except UserError as error:
        raise ValueError(str(error).removeprefix(f"{path.parent}/").rstrip(": ")) from None
