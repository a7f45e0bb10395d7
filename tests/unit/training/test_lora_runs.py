"""Runs that train adapters: what they train, save and resume, and commands that read what they saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.deepspeed_files import zero_file
from helpers.evaluating import evaluated, options, write_set
from helpers.generating import generated
from helpers.resuming import check_resume
from helpers.runs import crash_at, tiny_argv
from helpers.training import GOLDEN, golden_argv, metrics_of, start, train_here
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluate import read_settings
from promptkd.errors import UserError
from promptkd.evaluation.exposure_bias import run as exposure_bias
from promptkd.methods.registry import METHODS
from promptkd.models.loading import load_causal_lm
from promptkd.training.setup import build_trainer
from train import resolve

LORA = ["--lora-r", "4", "--lora-dropout", "0.1"]
SHORT = ["--batch-size", "2", "--total-iters", "2", "--max-length", "104"]
STUDENT, TEACHER = (str(GOLDEN / "models" / name) for name in ("gpt2_student", "gpt2_teacher"))
IDS = torch.arange(1, 25).view(2, 12)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of PromptKD with adapters: `kept` saves them, `merged` saves complete models under ZeRO-3."""
    folder = tmp_path_factory.mktemp("runs")
    more = ["--dev-num", "2", "--checkpoint-every", "1"]
    trainer = train_here(tiny_argv("promptkd", folder / "kept", *SHORT, *LORA, *more, "--total-iters", "1"))
    zero3 = ["--deepspeed_config", zero_file(folder, 3)]
    train_here(tiny_argv("promptkd", folder / "merged", *SHORT, *LORA, "--merge", "--total-iters", "1", *zero3))
    module = trainer.method.student.module
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    assert len(trained) == 16 and all(".lora_" in name for name in trained)
    optimizer = trainer.method.student.engine.basic_optimizer
    states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    count = sum(value.numel() for value in module.parameters() if value.requires_grad)
    assert sum(state.numel() for state in states) == 2 * count
    base, after = load_file(Path(STUDENT) / "model.safetensors"), module.model.state_dict()
    for name, value in base.items():
        name = name if name.startswith("transformer.") else f"transformer.{name}"
        place = (
            name
            if name in after
            else name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        )
        assert torch.equal(after[place], value), "frozen weights stay as they were, bit for bit"
    return folder


@torch.no_grad()
def test_lora_run_saves_adapters_or_complete_models(runs):
    """Both runs take the same steps, with and without ZeRO-3. Checkpoints hold adapters only."""
    for row, other in zip(metrics_of(runs / "kept"), metrics_of(runs / "merged"), strict=True):
        assert row["student_loss"] == pytest.approx(other["student_loss"], abs=1e-5)
    for name in ("last", "best_rougeL", "best_loss"):
        files = {path.name for path in (runs / "kept" / name).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "promptkd.json"} <= files
        assert not files & {"config.json", "model.safetensors", "README.md"}
    assert AutoTokenizer.from_pretrained(runs / "kept/last").eos_token_id == 0
    [checkpoint] = (runs / "kept/checkpoints").iterdir()
    saved = load_file(checkpoint / "student-rank0.safetensors")
    assert sum(value.numel() for value in saved.values()) < 3.1 * sum(
        value.numel() for value in load_file(runs / "kept/last/adapter_model.safetensors").values()
    )
    base, plain = (AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32) for _ in range(2))
    kept = PeftModel.from_pretrained(base, runs / "kept/last").eval()(IDS).logits
    complete = AutoModelForCausalLM.from_pretrained(runs / "merged/last")
    assert not any("lora" in name for name in complete.state_dict())
    torch.testing.assert_close(complete(IDS).logits, kept, rtol=1e-6, atol=1e-5)
    assert (kept - plain(IDS).logits).abs().max() > 1e-3


def test_commands_take_a_folder_of_adapters(runs, tmp_path, monkeypatch):
    """They give what the merged folder gives, and record the base model."""
    write_set(tmp_path / "data/own", rows=3)
    results = {}
    for name in ("kept", "merged"):
        argv = options(tmp_path / "data", tmp_path / name, "--data-names", "own", "--overwrite")
        argv += ["--model-path", str(runs / name / "last")]
        results[name] = evaluated(argv)["sets"]["own"]["rougeL"]
    assert results["kept"] == results["merged"]
    record = json.loads((tmp_path / "kept/results.json").read_text())["model"]
    assert record["base"]["path"] == STUDENT and record["base"]["fingerprint"]["files"]
    adapter = str(runs / "kept/last")
    [row] = generated(tmp_path / "generated", "--model-path", adapter, "--gen-num", "1", "--max-length", "104")
    assert row["gen_answer"]
    argv = options(tmp_path / "data", tmp_path / "bias", "--data-names", "own", "--model-path", adapter)
    argv += ["--type", "exposure_bias", "--teacher-model-path", TEACHER, "--sample-times", "1"]
    exposure_bias(read_settings(argv))
    bias = json.loads((tmp_path / "bias/results.json").read_text())
    assert bias["sets"]["own"]["mean_R"] > 0 and bias["model"]["base"]["path"] == STUDENT


def test_adapter_is_a_student_and_a_teacher(runs, tmp_path):
    """--lora-r continues an adapter, and without it all weights of the merged model are trained."""
    adapter = str(runs / "kept/last")
    build = build_trainer(resolve(tiny_argv("promptkd", tmp_path / "a", *SHORT, *LORA, "--model-path", adapter)))
    kept = load_file(runs / "kept/last/adapter_model.safetensors")
    state = build.method.student.module.model.state_dict()
    for name, value in kept.items():
        place = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(state[place], value)
    build.checkpoints.unlock()
    more = ["--model-path", adapter, "--teacher-model-path", adapter]
    trainer = train_here(tiny_argv("kd", tmp_path / "b", *SHORT, *more))
    assert all(value.requires_grad for value in trainer.method.student.module.parameters())
    assert (tmp_path / "b/last/model.safetensors").is_file()
    inputs = json.loads((tmp_path / "b/config.json").read_text())["inputs"]
    assert inputs["student_base"]["path"] == inputs["teacher_base"]["path"] == STUDENT


@pytest.mark.parametrize(
    "method, packed",
    [
        pytest.param(method, packed, marks=() if (i + packed) % 2 else pytest.mark.slow)
        for i, method in enumerate(METHODS)
        for packed in (False, True)
    ],
)
def test_every_method_trains_adapters(method, packed, tmp_path):
    if packed:
        pytest.importorskip("bitsandbytes", reason="an optional library: pip install bitsandbytes")
    lora = ["--lora-r", "4", *(["--student-quantization", "4bit"] if packed else [])]
    extra = ["--student-data-dir", str(GOLDEN / "processed/dolly/full/gpt2")] if method == "distillm2" else []
    trainer = build_trainer(resolve(tiny_argv(method, tmp_path / "run", *SHORT, *lora, *extra, "--seed", "3")))
    model = trainer.method.student.module.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train_step(1)
    trainer.checkpoints.unlock()
    [row] = metrics_of(tmp_path / "run")
    assert all(value == value for value in row.values())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in before if ".lora_B." in name} <= changed
    assert all(".lora_" in name for name in changed)
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules()) == packed


def test_quantized_student_is_near_the_full_one(tmp_path):
    pytest.importorskip("bitsandbytes", reason="an optional library: pip install bitsandbytes")
    losses = []
    for kind in ("none", "8bit", "4bit"):
        train_here(tiny_argv("sft", tmp_path / kind, *SHORT, "--lora-r", "4", "--student-quantization", kind))
        losses.append([row["loss"] for row in metrics_of(tmp_path / kind)])
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[1] != losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=0.2) and losses[2] != losses[1]
    saved = load_file(tmp_path / "4bit/last/adapter_model.safetensors")
    assert all(value.shape[0 if "lora_A" in name else 1] == 4 for name, value in saved.items())
    merged = load_causal_lm(str(tmp_path / "4bit/last"), torch.float32, "--model-path").state_dict()
    base = load_causal_lm(STUDENT, torch.float32, "--model-path").state_dict()
    changed = {name for name, value in base.items() if not torch.equal(merged[name], value)}
    assert changed == {name for name in base if ".c_" in name and name.endswith(".weight")}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "method, stage, bf16, extra",
    [
        ("sft", 1, False, ["--gradient-checkpointing"]),
        pytest.param("promptkd", 3, True, ["--gradient-checkpointing"], marks=slow),
        pytest.param("promptkd", 0, False, [], marks=slow),
        pytest.param("promptkd", 1, True, [], marks=slow),
        pytest.param("promptkd", 2, False, ["--student-quantization", "4bit"], marks=slow),
        pytest.param("minillm", 0, False, ["--lora-dropout", "0"], marks=slow),
    ],
)
def test_resume_with_adapters_is_bitwise(method, stage, bf16, extra, options, tmp_path):
    engine = ["--deepspeed_config", zero_file(tmp_path, stage, bf16)]
    check_resume(options, tmp_path, *LORA, *engine, *extra, method=method)


def test_resume_needs_the_same_base_and_adapters(options, tmp_path):
    crash_at(3, options(tmp_path / "run", *LORA, method="sft"))
    other = ["--model-path", TEACHER, "--resume"]
    with pytest.raises(UserError, match=r"--model-path \(other content\)"):
        build_trainer(resolve(options(tmp_path / "run", *LORA, *other, method="sft")))
    with pytest.raises(UserError, match=r"--lora-r 8 \(there: 4\)"):
        build_trainer(resolve(options(tmp_path / "run", *LORA, "--lora-r", "8", "--resume", method="sft")))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_adapters_on_two_ranks_equal_those_on_one(stage, tmp_path):
    rest = ["--lora-r", "4", "--total-iters", "3", "--deepspeed_config", zero_file(tmp_path, stage)]
    train_here(golden_argv("promptkd", tmp_path / "one", "--batch-size", "2", *rest[:-2]))
    done = start(golden_argv("promptkd", tmp_path / "two", "--batch-size", "1", *rest), ranks=2)
    assert done.returncode == 0, done.stderr
    for row, other in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        assert row["student_loss"] == pytest.approx(other["student_loss"], abs=1e-5)
    one, two = (load_file(tmp_path / name / "last/adapter_model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
