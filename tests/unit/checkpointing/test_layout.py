"""Checkpoints of other versions: an older layout resumes bit for bit, a newer one is refused with its version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.hostile_damage import sign
from helpers.runs import assert_same_run, crash_at
from helpers.training import train_here

from promptkd import __version__
from promptkd.checkpointing.integrity import LAYOUT, read_state, verified_state
from promptkd.errors import UserError


def change_state(folder: Path, **values: object) -> None:
    """Set keys of state.json, or remove those that are None, and sign the checkpoint."""
    state = json.loads((folder / "state.json").read_text())
    state = {key: value for key, value in (state | values).items() if value is not None}
    (folder / "state.json").write_text(json.dumps(state))
    sign(folder)


def to_layout_1(folder: Path) -> None:
    """Turn a checkpoint into one of the first layout, which has no version and calls the prompt's engine "teacher"."""
    learners = json.loads((folder / "state.json").read_text())["learners"]
    learners = {"teacher" if name == "prompt" else name: value for name, value in learners.items()}
    for path in folder.glob("prompt-*"):
        path.rename(folder / path.name.replace("prompt", "teacher"))
    change_state(folder, learners=learners, layout=None, version=None)


def test_layout_1_resumes_bitwise(options, tmp_path):
    train_here(options(tmp_path / "whole"))
    crash_at(4, options(tmp_path / "cut"))
    checkpoint = tmp_path / "cut/checkpoints/step-2"
    to_layout_1(checkpoint)
    assert {path.name for path in checkpoint.glob("*.safetensors")} == {
        "student-rank0.safetensors",
        "teacher-rank0.safetensors",
    }
    train_here(options(tmp_path / "cut", "--resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    state = verified_state(tmp_path / "cut/checkpoints/step-5")
    assert (state["layout"], state["version"], set(state["learners"])) == (LAYOUT, __version__, {"student", "prompt"})


@pytest.fixture
def interrupted(options, tmp_path) -> Path:
    crash_at(3, options(tmp_path / "run", method="sft"))
    return tmp_path / "run/checkpoints/step-2"


def test_newer_layout_is_refused_with_its_version(options, interrupted):
    change_state(interrupted, layout=LAYOUT + 1, version="9.1.0")
    with pytest.raises(UserError, match=r"step-2 was written by promptkd 9\.1\.0, .*resume it with that version"):
        train_here(options(interrupted.parents[1], "--resume", method="sft"))


@pytest.mark.parametrize(("version", "writer"), [(None, r"promptkd 0\.1\.0 or older"), ("0.0.9", r"promptkd 0\.0\.9")])
def test_unreadable_older_state_names_its_version(version, writer, options, interrupted):
    change_state(interrupted, layout=None, version=version, method_tensors=None)
    with pytest.raises(UserError, match=rf"step-2 is damaged \(state\.json of {writer} lacks 'method_tensors'\)"):
        train_here(options(interrupted.parents[1], "--resume", method="sft"))


def test_engines_of_another_method_are_refused_with_the_version(options, interrupted):
    learners = read_state(interrupted)["learners"]
    change_state(interrupted, learners=learners | {"critic": learners["student"]})
    (interrupted / "critic-rank0.safetensors").write_bytes((interrupted / "student-rank0.safetensors").read_bytes())
    sign(interrupted)
    with pytest.raises(UserError, match=rf"of promptkd {__version__} is of student, critic, the run has student"):
        train_here(options(interrupted.parents[1], "--resume", method="sft"))


def test_layout_must_be_a_positive_integer(interrupted):
    for layout in (0, -1, "2", True):
        change_state(interrupted, layout=layout)
        with pytest.raises(ValueError, match=r"state\.json"):
            read_state(interrupted)
