"""Exposure bias in the course of training (--exposure-bias-every)."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.deepspeed_files import zero_file
from helpers.stand_in_ranks import OneOf
from helpers.training import GOLDEN, golden_argv, metrics_of, train_here
from transformers import AutoModelForCausalLM

from promptkd.errors import UserError
from promptkd.evaluation.exposure_bias import Protocol, accumulated_errors, curves
from promptkd.generation.sampling import Sampling
from promptkd.models.wrapper import LanguageModel


def training_argv(save: Path, *extra: str, method: str = "promptkd") -> list[str]:
    sizes = ["--max-length", "104", "--batch-size", "4", "--total-iters", "3", "--dev-num", "4", "--no-eval-gen"]
    return golden_argv(method, save, *sizes, *extra)


def test_training_records_exposure_bias_without_changing_the_run(tmp_path):
    """With ZeRO-3, where both models have to be gathered first. The row before training is that of the two models."""
    zero = ["--deepspeed_config", zero_file(tmp_path, 3)]
    train_here(training_argv(tmp_path / "without", *zero))
    often = ["--exposure-bias-every", "2", "--exposure-bias-rows", "3"]
    trainer = train_here(training_argv(tmp_path / "with", *zero, *often))
    losses = [[row["student_loss"] for row in metrics_of(tmp_path / name)] for name in ("with", "without")]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    rows = metrics_of(tmp_path / "with", "exposure_bias")
    assert [row["step"] for row in rows] == [0, 2, 3], "every second step and the last"
    assert rows[0]["curve"] != rows[1]["curve"] and rows[0]["curve"][-1] == rows[0]["ex_acc_err"]

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(GOLDEN / f"models/gpt2_{name}").eval() for name in ("student", "teacher")
    )
    tokenizer = trainer.method.context.tokenizer
    how = Protocol(8, [tokenizer.eos_token_id], Sampling(), 1, seed=10, token_budget=999, forward_budget=999)
    asked = [trainer.dev.examples[row].prompt for row in range(3)]
    errors = accumulated_errors(LanguageModel(student), LanguageModel(teacher), asked, how, OneOf())
    found = curves(errors, 10)
    assert rows[0]["curve"] == pytest.approx(found["ex_acc_err"], rel=1e-3, abs=1e-2)
    for name in ("mean_R", "mean_eps"):
        assert rows[0][name] == pytest.approx(found[name][-1], rel=1e-4)


@pytest.mark.parametrize("method, extra", [("sft", []), ("kd", ["--kd-ratio", "0"])])
def test_methods_without_a_teacher_are_measured_against_one(tmp_path, method, extra):
    often = ["--exposure-bias-every", "2", "--exposure-bias-rows", "3"]
    folders = {"of": tmp_path / "promptkd", "with": tmp_path / "with", "without": tmp_path / "without"}
    train_here(training_argv(folders["of"], *often))
    teacher = ["--teacher-model-path", str(GOLDEN / "models/gpt2_teacher")]
    train_here([*training_argv(folders["with"], *often, *extra, method=method), *teacher])
    train_here(training_argv(folders["without"], *extra, method=method))
    rows = {name: metrics_of(folders[name], "exposure_bias") for name in ("of", "with")}
    assert rows["with"][0]["curve"] == rows["of"][0]["curve"], "the same models before training"
    assert metrics_of(folders["with"])[-1]["loss"] == metrics_of(folders["without"])[-1]["loss"]


@pytest.mark.parametrize(
    "method, extra, says",
    [
        ("sft", [], "--exposure-bias-every needs --teacher-model-path"),
        ("promptkd", ["--dev-num", "0"], "--dev-num"),
        ("promptkd", ["--exposure-bias-rows", "0"], "--exposure-bias-rows 0"),
    ],
)
def test_training_refuses_exposure_bias_that_it_cannot_measure(tmp_path, method, extra, says):
    with pytest.raises(UserError, match=says):
        train_here(training_argv(tmp_path / "run", "--exposure-bias-every", "2", *extra, method=method))
    assert not (tmp_path / "run").exists()
