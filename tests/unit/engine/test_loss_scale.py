"""fp16 engines: overflows lower the loss scale and are counted, a loss that is not finite does neither."""

import json

import pytest
import torch
from helpers.poison import poison
from helpers.runs import assert_same_run, crash
from helpers.training import golden_argv, metrics_of

from promptkd.config import resolve as rules
from promptkd.config.deepspeed import read_deepspeed_config
from promptkd.errors import RunError
from promptkd.training import setup as build
from train import resolve


@pytest.fixture
def fp16_on_cpu(monkeypatch):
    """The CPU has kernels for fp16, slow ones; train.py and DeepSpeed refuse it there."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: True)
    cuda = torch.device("cuda")
    monkeypatch.setattr(
        rules, "read_deepspeed_config", lambda path, _, *option: read_deepspeed_config(path, cuda, *option)
    )


def options(tmp_path, name: str, *extra: str, method: str = "promptkd", stage: int = 1, **fp16) -> list[str]:
    file = tmp_path / f"{name}.json"
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    file.write_text(json.dumps({"fp16": {"enabled": True, **fp16}, "zero_optimization": zero}))
    short = ["--batch-size", "2", "--total-iters", "4", "--no-do-sample", "--lr-decay-style", "cosine"]
    return golden_argv(method, tmp_path / name, *short, "--deepspeed_config", str(file), *extra)


def train(argv: list[str]):
    trainer = build.build_trainer(resolve(argv))
    trainer.fit()
    return trainer


@pytest.mark.parametrize(
    "stage, lora", [(1, []), (3, []), *(pytest.param(n, ["--lora-r", "4"], marks=pytest.mark.slow) for n in (1, 3))]
)
def test_fp16_run_is_near_fp32(stage, lora, fp16_on_cpu, tmp_path):
    short = [
        "--token-budget",
        "150",
        "--total-iters",
        "2",
        *lora,
    ]  # several micro-batches a step: gradients are summed in fp16
    train(options(tmp_path, "fp32", *short, enabled=False))
    train(options(tmp_path, "fp16", *short, stage=stage, initial_scale_power=11))
    for low, row in zip(metrics_of(tmp_path / "fp16"), metrics_of(tmp_path / "fp32"), strict=True):
        for key in ("student_loss", "prompt_kd_loss", "prompt_base_loss"):
            assert low[key] == pytest.approx(row[key], abs=0.005), key
        for key in ("grad_norm", "prompt_grad_norm", "prompt_drift"):
            assert low[key] == pytest.approx(row[key], rel=0.03, abs=1e-4), key
        scales = {key: low[key] for key in low if key.endswith(("loss_scale", "skipped_steps"))}
        assert scales == {"loss_scale": 2048, "skipped_steps": 0, "prompt_loss_scale": 2048, "prompt_skipped_steps": 0}
        assert "loss_scale" not in row


@pytest.mark.parametrize("stage", [1, 3])
def test_overflow_is_counted_lowers_the_scale_and_moves_nothing_else(stage, fp16_on_cpu, tmp_path):
    fp16 = {"initial_scale_power": 30, "hysteresis": 2, "loss_scale_window": 1000}
    trainer = build.build_trainer(resolve(options(tmp_path, "run", method="sft", stage=stage, **fp16)))
    parameter = trainer.method.student.module.model.get_input_embeddings().weight
    start, rate = trainer.method.student.full_param(parameter), trainer.method.student.lr
    trainer.fit()
    rows = metrics_of(tmp_path / "run")
    assert [row["loss_scale"] for row in rows] == [2.0**30, 2.0**29, 2.0**28, 2.0**27]
    assert [row["skipped_steps"] for row in rows] == [1, 2, 3, 4]
    assert {row["lr"] for row in rows} == {rate} and {row["grad_norm"] for row in rows} == {float("inf")}
    assert torch.equal(trainer.method.student.full_param(parameter), start)


@pytest.mark.parametrize("stage", [1, 3])
def test_overflow_at_the_smallest_scale_ends_the_run(stage, fp16_on_cpu, tmp_path):
    fp16 = {"initial_scale_power": 30, "hysteresis": 2, "min_loss_scale": 2**29}
    message = "sft, step 3: gradients of the student overflow fp16 at the smallest loss scale, 536870912: name a bf16"
    with pytest.raises(RunError, match=message) as raised:
        train(options(tmp_path, "run", method="sft", stage=stage, **fp16))
    assert "\n" not in str(raised.value)
    assert [row["loss_scale"] for row in metrics_of(tmp_path / "run")] == [2.0**30, 2.0**29]


def test_overflow_of_a_fixed_scale_is_a_gradient_that_is_not_finite(fp16_on_cpu, tmp_path):
    with pytest.raises(RunError, match="sft, step 1: not finite: student gradient"):
        train(options(tmp_path, "run", method="sft", loss_scale=2.0**30))
    train(options(tmp_path, "skips", "--skip-nonfinite", "4", method="sft", loss_scale=2.0**30))
    assert len(metrics_of(tmp_path / "skips", "skipped")) == 4


def test_loss_that_is_not_finite_is_no_overflow(fp16_on_cpu, tmp_path):
    """Even at the smallest scale: the step is dropped, the scale stays and nothing is counted."""
    fp16 = {"initial_scale_power": 4, "min_loss_scale": 16, "hysteresis": 1}
    with pytest.raises(RunError, match="sft, step 2: not finite: loss"):
        poison(2, options(tmp_path, "ends", method="sft", **fp16)).fit()
    poison(2, options(tmp_path, "run", "--skip-nonfinite", "1", method="sft", **fp16)).fit()
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 3, 4]
    assert {(row["loss_scale"], row["skipped_steps"]) for row in rows} == {(16, 0)}
    assert len({row["lr"] for row in rows}) == 3


@pytest.mark.parametrize("stage", [1, 3])
def test_resumed_run_has_the_same_loss_scale(stage, fp16_on_cpu, tmp_path):
    """The checkpoint is taken between overflows: scale, hysteresis and window go on as if nothing had happened."""
    fp16 = {"initial_scale_power": 22, "hysteresis": 2, "loss_scale_window": 2}
    often = ["--total-iters", "8", "--checkpoint-every", "3"]
    train(options(tmp_path, "whole", *often, method="sft", stage=stage, **fp16))
    argv = options(tmp_path, "resumed", *often, method="sft", stage=stage, **fp16)
    crash(build.build_trainer(resolve(argv)), 5)
    train([*argv, "--resume"])
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    rows = metrics_of(tmp_path / "whole")
    assert len({row["loss_scale"] for row in rows}) > 2 and 0 < rows[-1]["skipped_steps"] < 8
