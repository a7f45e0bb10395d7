"""The methods that choose responses and divergences: their definitions, and what they do not depend on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.runs import assert_same_run, crash_at
from helpers.training import GOLDEN, golden_argv, metrics_of, start, train_here

from promptkd.losses import DIVERGENCES, divergence

DATA = GOLDEN / "processed/dolly/full/gpt2"
SHORT = ("--batch-size", "4", "--total-iters", "3", "--lr", "0.005")


@pytest.fixture
def pairs(tmp_path) -> list[str]:
    """Two data sets with the same prompts and other responses."""
    folder = tmp_path / "student_responses"
    folder.mkdir()
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()]
    words = "a few words that a student may say"
    rows = [{**row, "output": words[: 3 + 5 * (i % 6)]} for i, row in enumerate(rows)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = tmp_path / "teacher_responses"
    teacher.mkdir()
    for name in ("train.jsonl", "valid.jsonl"):
        shutil.copy(DATA / name, teacher)
    return ["--data-dir", str(teacher), "--student-data-dir", str(folder)]


def extra_of(method: str, pairs: list[str]) -> list[str]:
    if method == "distillm":
        return ["--init-threshold", "0.7", "--capacity", "4"]
    return pairs if method == "distillm2" else []


METHODS = ["gkd", "distillm", "distillm2"]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gkd_loss_is_the_mean_divergence_over_response_tokens(name, tmp_path):
    trainer = train_here(
        golden_argv(
            "gkd",
            tmp_path,
            "--divergence",
            name,
            "--student-data-fraction",
            "0",
            "--batch-size",
            "6",
            "--total-iters",
            "1",
            "--lr",
            "0",
            "--token-budget",
            "200",
        )
    )
    examples = trainer.local_batch(1).examples
    assert len({len(example.response) for example in examples}) > 2
    values = []
    for example in examples:
        ids = torch.tensor([[*example.prompt, *example.response]])
        with torch.no_grad():
            q, p = (
                model.module.model(ids).logits[0, len(example.prompt) - 1 : -1]
                for model in (trainer.method.student, trainer.method.teacher)
            )
        values.append(divergence(name, q, p))
    assert metrics_of(tmp_path)[0]["loss"] == pytest.approx(float(torch.cat(values).mean()), rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_equal_one(method, pairs, tmp_path):
    extra = [*SHORT, *extra_of(method, pairs)]
    train_here(golden_argv(method, tmp_path / "one", *extra))
    done = start(golden_argv(method, tmp_path / "two", *extra, "--batch-size", "2"), ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = ([row["loss"] for row in metrics_of(tmp_path / name)] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_step_does_not_depend_on_accumulation(method, pairs, tmp_path):
    extra = [*SHORT, *extra_of(method, pairs)]
    train_here(golden_argv(method, tmp_path / "one", *extra))
    split = ["--batch-size", "1", "--gradient-accumulation-steps", "4"]
    train_here(golden_argv(method, tmp_path / "two", *extra, *split))
    one, two = ([row["loss"] for row in metrics_of(tmp_path / name)] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_killed_run_resumes_bit_for_bit(method, pairs, tmp_path):
    often = ["--checkpoint-every", "1", "--eval-interval", "2", "--dev-num", "4", "--no-eval-gen"]
    extra = [*SHORT, *extra_of(method, pairs), *often]
    train_here(golden_argv(method, tmp_path / "through", *extra))
    crash_at(3, golden_argv(method, tmp_path / "killed", *extra))
    train_here(golden_argv(method, tmp_path / "killed", *extra, "--resume"))
    assert_same_run(tmp_path / "through", tmp_path / "killed")


@pytest.mark.parametrize("name", ["jsd", "skew_reverse_kl"])
def test_promptkd_takes_any_divergence_and_given_responses(name, tmp_path):
    terms = [word for term in ("teacher", "base", "student") for word in (f"--{term}-kld-type", name)]
    train_here(golden_argv("promptkd", tmp_path / "run", *SHORT, *terms, "--student-data-fraction", "0.5"))
    plain = golden_argv("promptkd", tmp_path / "plain", *SHORT)
    train_here(plain)
    rows = [metrics_of(tmp_path / folder)[0] for folder in ("run", "plain")]
    keys = ("student_loss", "prompt_kd_loss")
    assert all(rows[0][key] > 0 and rows[0][key] != rows[1][key] for key in keys)


def test_promptkd_without_prompt_saves_no_prompt(tmp_path):
    train_here(golden_argv("promptkd", tmp_path, *SHORT, "--prompt-len", "0"))
    assert (tmp_path / "last/model.safetensors").is_file() and not Path(tmp_path / "prompt").exists()
    assert json.loads((tmp_path / "config.json").read_text())["parameters"]["prompt"] is None
