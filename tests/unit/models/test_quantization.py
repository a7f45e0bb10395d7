"""A teacher of 8 or 4 bits: refused settings, options of loading, and training steps on the CPU."""

from __future__ import annotations

import pytest
import torch
from helpers.runs import tiny_argv
from helpers.training import metrics_of, train_here

from promptkd.config.deepspeed import CONFIGS
from promptkd.errors import UserError
from promptkd.models.quantization import check_installed, importlib, loading_options
from train import resolve

GPU = torch.device("cuda", 1)
ZERO3 = str(CONFIGS / "ds_config_zero3_fp32.json")
TOGETHER = ["--model-parallel", "--model-parallel-size", "2"]


@pytest.mark.parametrize(
    "method, extra, message",
    [
        ("promptkd", ["--teacher-deepspeed-config", ZERO3], "does not go with ZeRO-3"),
        ("promptkd", TOGETHER, "does not go with a teacher cut by --model-parallel-size"),
        ("sft", [], "needs --teacher-model-path"),
    ],
)
def test_quantization_refuses_options(method, extra, message, save):
    with pytest.raises(UserError, match=message):
        resolve([*tiny_argv(method, save), "--teacher-quantization", "4bit", *extra])


def test_quantization_without_bitsandbytes_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_installed("none", "--teacher-quantization")
    with pytest.raises(
        UserError, match=r"--student-quantization 4bit needs bitsandbytes, which is not installed: .*pip install"
    ):
        check_installed("4bit", "--student-quantization")


def test_quantization_goes_with_a_partitioned_student(save):
    student_only = [*TOGETHER, "--teacher-model-parallel-size", "1"]
    config = resolve([*tiny_argv("promptkd", save), "--teacher-quantization", "4bit", *student_only])
    assert config.parallel.size == 2 and config.parallel.teacher_size == 1


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
