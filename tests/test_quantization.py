"""A teacher in 8 or 4 bits: what is refused, and what loading is told. Nothing here runs it: that takes a GPU."""

from __future__ import annotations

import pytest
import torch
from conftest import train_here
from runs import tiny_argv

from promptkd import build
from promptkd.errors import UserError
from promptkd.quantization import check_quantization, importlib, loading_options
from train import read_settings

GPU = torch.device("cuda", 1)
TOGETHER = ["--model-parallel", "--model-parallel-size", "2"]


def test_a_cpu_is_told_so_before_any_model_is_read(save, monkeypatch):
    monkeypatch.setattr(build, "load_models", None)
    with pytest.raises(UserError, match="--teacher-quantization 8bit needs a GPU"):
        train_here([*tiny_argv("promptkd", save), "--teacher-quantization", "8bit"])
    assert not save.exists()


@pytest.mark.parametrize(
    "method, extra, stage, installed, message",
    [
        ("promptkd", [], 1, False, "bitsandbytes, which is not installed: .*pip install"),
        ("promptkd", [], 3, True, "does not go with ZeRO-3"),
        ("promptkd", TOGETHER, 1, True, "does not go with a teacher cut by --model-parallel-size"),
        ("sft", [], 1, True, "needs --teacher-model-path"),
    ],
)
def test_what_does_not_go_with_it(method, extra, stage, installed, message, save, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    settings = read_settings([*tiny_argv(method, save), "--teacher-quantization", "4bit", *extra])
    with pytest.raises(UserError, match=message):
        check_quantization(settings, stage, GPU)


def test_what_goes_with_it(save, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    student_alone = [*TOGETHER, "--teacher-model-parallel-size", "1"]
    check_quantization(
        read_settings([*tiny_argv("promptkd", save), "--teacher-quantization", "4bit", *student_alone]), 2, GPU
    )


def test_loading_is_told_the_bits_the_precision_and_the_device():
    assert loading_options("none", torch.bfloat16, GPU) == {}
    four, eight = (loading_options(kind, torch.bfloat16, GPU) for kind in ("4bit", "8bit"))
    config = four["quantization_config"]
    assert (
        config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_compute_dtype == torch.bfloat16
    )
    assert eight["quantization_config"].load_in_8bit and not eight["quantization_config"].load_in_4bit
    assert four["device_map"] == eight["device_map"] == {"": GPU}
