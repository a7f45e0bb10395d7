"""Options from a file: the values, what wins, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.training import GOLDEN, golden_argv, train_here

from promptkd.config.option_file import as_arguments
from promptkd.errors import UserError
from train import read_settings

YAML = """
method: kd
model_path: S
teacher_model_path: T
data_dir: D
batch_size: 4
lr: 5e-4
eval_gen: false
total_iters: null
template: chat
chat_template_kwargs: {enable_thinking: false}
template_time: 2026-11-25
"""


def write(folder, text, name="run.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_option_file_gives_options_and_the_command_line_wins(tmp_path):
    settings = read_settings(["--config", write(tmp_path, YAML), "--batch-size", "2"])
    assert settings.method == "kd" and settings.models.model_path == "S" and settings.optimizer.batch_size == 2
    assert settings.optimizer.lr == 5e-4 and settings.run.eval_gen is False and settings.optimizer.total_iters is None
    assert settings.data.chat_template_kwargs == {"enable_thinking": False}
    assert settings.data.template_time == "2026-11-25T00:00:00"
    other = read_settings([f"--config={write(tmp_path, YAML)}", "--method", "seqkd", "--eval-gen"])
    assert other.method == "seqkd" and other.run.eval_gen


def test_option_file_takes_a_runs_own_config(tmp_path):
    train_here(golden_argv("sft", tmp_path / "run", "--total-iters", "1", "--batch-size", "2"))
    settings = read_settings(["--config", str(tmp_path / "run/config.json"), "--save", str(tmp_path / "again")])
    recorded = json.loads((tmp_path / "run/config.json").read_text())["settings"]
    assert settings.optimizer.batch_size == 2 and settings.run.save == str(tmp_path / "again")
    assert settings.models.model_path == recorded["model_path"] == str(GOLDEN / "models/gpt2_student")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: sft\nbatch_sise: 2", "run.yaml: unknown option --batch-sise: did you mean --batch-size"),
        ("method: sft\nbatch_size: many", "--batch-size"),
        ("method: sft\nbatch_size: true", "--batch-size"),
        ("method: sft\nlr: 1\nlr: 2", "'lr' occurs twice"),
        ("- a\n- b", "holds no options"),
        ("method: [", "neither YAML nor JSON"),
        ("method: sft\nlr: [[1]]", "lr is a list"),
        ("!!python/object/apply:os.system [touch evil]", "neither YAML nor JSON"),
    ],
)
def test_option_file_refuses_what_it_cannot_read(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        read_settings(["--config", write(tmp_path, text), "--model-path", "S"])


def test_option_file_accepts_a_removed_option_only_with_its_remaining_value(tmp_path):
    settings = read_settings(["--config", write(tmp_path, "method: sft\nmodel_path: S\nrollout_engine: hf")])
    assert not hasattr(settings.method_settings, "rollout_engine")
    assert read_settings(["--method", "sft", "--model-path", "S", "--rollout-engine", "hf"]) == settings
    with pytest.raises(UserError, match=r"rollout-engine vllm \(removed after version 0\.1\.0\): leave"):
        read_settings(["--config", write(tmp_path, "method: sft\nmodel_path: S\nrollout_engine: vllm")])


def test_option_file_is_named_when_it_is_missing(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_settings(["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(UserError, match="last argument"):
        read_settings(["--method", "sft", "--config"])


def test_python_values_become_arguments():
    """As a notebook passes them."""
    values = {"batch_size": np.int64(4), "lr": np.float32(0.5), "seeds": range(2), "data_names": [Path("a"), "b"]}
    expected = ["--batch-size=4", "--lr=0.5", "--seeds", "0", "1", "--data-names", "a", "b"]
    assert as_arguments(values, "train()") == expected
    for value in ({"a": object()}, object(), [[1]], {1: float("nan"), "a": {1}}):
        with pytest.raises(UserError, match="template_time"):
            as_arguments({"template_time": value}, "train()")
