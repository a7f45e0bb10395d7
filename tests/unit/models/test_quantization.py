"""A teacher of 8 or 4 bits: refused settings, options of loading, and training steps on the CPU."""

from __future__ import annotations

import pytest
import torch
from helpers.runs import tiny_argv
from helpers.training import metrics_of, train_here

from promptkd.errors import UserError
from promptkd.models.quantization import check_quantization, importlib, loading_options
from train import read_settings

GPU = torch.device("cuda", 1)
TOGETHER = ["--model-parallel", "--model-parallel-size", "2"]


@pytest.mark.parametrize(
    "method, extra, stage, installed, message",
    [
        ("promptkd", [], 1, False, "bitsandbytes, which is not installed: .*pip install"),
        ("promptkd", [], 3, True, "does not go with ZeRO-3"),
        ("promptkd", TOGETHER, 1, True, "does not go with a teacher cut by --model-parallel-size"),
        ("sft", [], 1, True, "needs --teacher-model-path"),
    ],
)
def test_check_quantization_refuses_other_settings(method, extra, stage, installed, message, save, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    settings = read_settings([*tiny_argv(method, save), "--teacher-quantization", "4bit", *extra])
    with pytest.raises(UserError, match=message):
        check_quantization(settings, stage)


def test_check_quantization_accepts_a_sharded_student(save, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    student_alone = [*TOGETHER, "--teacher-model-parallel-size", "1"]
    check_quantization(
        read_settings([*tiny_argv("promptkd", save), "--teacher-quantization", "4bit", *student_alone]), 2
    )


def test_loading_options_give_bits_precision_and_device():
    assert loading_options("none", torch.bfloat16, GPU) == {}
    four, eight = (loading_options(kind, torch.bfloat16, GPU) for kind in ("4bit", "8bit"))
    config = four["quantization_config"]
    assert (
        config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_compute_dtype == torch.bfloat16
    )
    assert eight["quantization_config"].load_in_8bit and not eight["quantization_config"].load_in_4bit
    assert four["device_map"] == eight["device_map"] == {"": GPU}


@pytest.mark.parametrize(
    "method, kind, options",
    [
        ("promptkd", "4bit", ["--exposure-bias-every", "2", "--exposure-bias-rows", "2", "--dev-num", "4"]),
        ("promptkd", "8bit", []),
        ("kd", "8bit", []),
        ("minillm", "4bit", []),
    ],
)
def test_train_with_a_quantized_teacher_is_close_to_a_full_one(method, kind, options, tmp_path):
    pytest.importorskip("bitsandbytes", reason="an optional library: pip install bitsandbytes")
    short = ["--batch-size", "2", "--total-iters", "2", "--max-length", "104", "--no-eval-gen", *options]
    if method == "promptkd":
        short.append("--no-do-sample")
    rows = []
    for name in ("none", kind):
        trainer = train_here(tiny_argv(method, tmp_path / name, *short, "--teacher-quantization", name))
        rows.append(metrics_of(tmp_path / name))
    layers = {type(module).__name__ for module in trainer.method.teacher.module.modules()}
    assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[kind] in layers
    full, packed = ([row for key, row in sorted(each[0].items()) if key.endswith("loss")] for each in rows)
    assert packed == pytest.approx(full, rel=0.2, abs=0.02) and packed != full
    if method == "promptkd":
        assert rows[1][1]["prompt_drift"] > rows[1][0]["prompt_drift"] > 0, "the gradient reaches the prompt"
