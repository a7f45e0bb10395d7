"""Test the plan's formulas against models that are counted or computed by hand, and its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.planning import STUDENT, TEACHER, make
from helpers.tiny_models import make_model
from helpers.training import ROOT

from promptkd.errors import UserError
from promptkd.planning.hardware import parse_bytes
from promptkd.planning.held import CPU_FRAMEWORK
from promptkd.planning.memory import memory_of
from promptkd.planning.remedies import fits, remedies
from promptkd.planning.shapes import MODELS, read_shape
from promptkd.planning.show import plan_of, text_of

PAPER = {"gpt2-base": 124.4, "gpt2-medium": 354.8, "gpt2-large": 774.0, "gpt2-xlarge": 1557.6, "opt-1.3b": 1315.8}
PAPER |= {"opt-2.7b": 2651.6, "opt-6.7b": 6658.5, "opt-13b": 12853.5, "llama-7b": 6738.4, "llama-13b": 13015.9}


def zero(folder: Path, stage: int, **more: object) -> list[str]:
    file = folder / f"zero{stage}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, **more}}))
    return ["--deepspeed_config", str(file)]


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "mistral", "qwen2"])
def test_read_shape_counts_the_models_parameters(kind, tmp_path):
    model = make_model(kind, tmp_path / "model")
    assert read_shape(str(tmp_path / "model"), "--x").parameters() == sum(p.numel() for p in model.parameters())


def test_read_shape_fields_that_config_json_omits_have_transformers_defaults(tmp_path):
    assert read_shape(broken(tmp_path / "model", n_layer="gone"), "--x").layers == 12


def test_read_shape_paper_models_have_the_published_sizes():
    for name, millions in PAPER.items():
        assert read_shape(f"checkpoints/anywhere/{name.upper()}/", "--x").parameters() / 1e6 == pytest.approx(
            millions, 1e-3
        )
    assert {folder.name for folder in MODELS.iterdir()} == {*PAPER, "llama-70b"}
    complete, half = (read_shape("llama-70b", "--x").parameters(size) for size in (1, 2))
    assert complete == 68_976_648_192 and half / complete == pytest.approx(0.5, abs=0.01)


def test_memory_held_follows_zero_stages(tmp_path):
    """Of N weights there are 4 N bytes of masters and 8 N of moments over D ranks, none for a frozen teacher."""
    count, teacher = (read_shape(path, "--x").parameters() for path in (STUDENT, TEACHER))
    prompt = 7 * read_shape(TEACHER, "--x").width
    for stage, ranks in ((0, 2), (1, 1), (1, 2), (2, 4), (3, 4)):
        held = memory_of(make("--cpu", "--ranks", str(ranks), "--batch-size", "2", *zero(tmp_path, stage))).held
        shared = ranks if stage == 3 else 1
        assert held["weights of the student"] == 4 * count / shared
        assert held["weights of the teacher"] == 4 * teacher / shared
        assert held["optimizer states"] == pytest.approx(8 * (count + prompt) / (ranks if stage else 1))
        assert held["master weights"] == pytest.approx(4 * (count + prompt) / ranks if stage else 0)


def test_memory_offload_moves_fp32_masters_to_the_host():
    setting = make(
        "--gpus",
        "4",
        "--gpu",
        "a100",
        "--deepspeed_config",
        str(ROOT / "configs/deepspeed/ds_config_zero2_offload.json"),
    )
    memory, count = memory_of(setting), setting.student.parameters
    assert memory.held["weights of the student"] == 2 * count and memory.held["master weights"] == 0
    assert memory.host["master weights"] == pytest.approx(count, rel=0.01) and memory.peak < 4e9


def test_memory_quantized_teacher_holds_fewer_bytes():
    """Matrices take 1 byte, or half a byte and a float32 for every 64 weights. The rest is in bf16."""
    options = ["--gpus", "4", "--gpu", "a100", "--max-length", "512", "--max-prompt-length", "256"]
    held = {}
    for kind in ("none", "8bit", "4bit"):
        setting = make(*options, "--teacher-quantization", kind, student="llama-7b", teacher="llama-13b")
        held[kind] = memory_of(setting).held["weights of the teacher"]
    shape = setting.teacher.shape
    matrices = shape.layers * shape.layer_matrices
    assert held["none"] - held["8bit"] == matrices and held["none"] - held["4bit"] == matrices * (2 - 0.5625)
    assert held["4bit"] < 8e9 < 13e9 < held["8bit"] < 14e9
    parts = ["--gpus", "2", "--gpu", "a100", "--model-parallel", "--model-parallel-size", "2"]
    with pytest.raises(UserError, match="--teacher-quantization 8bit"):
        make(*parts, "--teacher-quantization", "8bit")


def test_memory_phases_depend_on_the_token_budget(tmp_path):
    base = make("--cpu", "--batch-size", "32", *zero(tmp_path, 1))
    assert base.micro_rows() == 16 and base.micro_batches() == 2  # 2048 tokens, sequences of 128
    memory = memory_of(base)
    phases = {"rollout", "prompt", "student", "update", "evaluation"}
    assert set(memory.phases) == phases and memory.peak > CPU_FRAMEWORK
    shape, rows = base.student.shape, 32
    cache = 2 * (shape.layers + 2) * rows * (64 + 64) * shape.keys * 4  # 63 of 64 new tokens: the room never grows
    assert memory.phases["rollout"]["key-value cache"] == cache
    smaller = memory_of(replace(base, token_budget=1024))
    assert smaller.phases["prompt"]["activations"] * 2 == memory.phases["prompt"]["activations"]
    saved = memory_of(make("--cpu", "--batch-size", "32", "--gradient-checkpointing", *zero(tmp_path, 1)))
    assert saved.phases["student"]["activations"] < memory.phases["student"]["activations"]
    kd = memory_of(make("--cpu", "--batch-size", "32", method="kd"))
    assert (
        set(kd.phases) == {"student", "update", "evaluation"}
        and kd.held["optimizer states"] < memory.held["optimizer states"]
    )


@pytest.mark.parametrize(
    ("method", "options", "answering", "sources", "phases"),
    [
        ("promptkd", [], ("student",), 1, ["rollout", "prompt"]),
        ("promptkd", ["--student-data-fraction", "0"], (), 1, ["prompt"]),
        ("promptkd", ["--prompt-len", "0"], ("student",), 1, ["rollout"]),
        ("gkd", [], ("student",), 1, ["rollout"]),
        ("gkd", ["--seq-kd"], ("student", "teacher"), 1, ["rollout"]),
        ("gkd", ["--student-data-fraction", "0"], (), 1, []),
        ("distillm", [], ("student",), 1, ["rollout"]),
        ("distillm", ["--lm-data-dir", "corpus"], ("student",), 2, ["rollout"]),
        ("distillm2", ["--student-data-dir", "pairs"], (), 2, []),
        ("kd", [], (), 1, []),
    ],
)
def test_phases_follow_where_the_responses_come_from(method, options, answering, sources, phases):
    setting = make("--cpu", "--batch-size", "16", *options, method=method)
    assert (setting.answering, setting.sources, setting.micro_batches()) == (answering, sources, sources)
    memory = memory_of(setting)
    assert list(memory.phases) == [*phases, "student", "update", "evaluation"]
    assert ("states" in memory.phases["student"]) == (phases == ["rollout", "prompt"])


def test_rollout_holds_the_larger_of_the_two_answering_models():
    caches = [
        memory_of(make("--cpu", *options, method="gkd")).phases["rollout"]["key-value cache"]
        for options in ([], ["--seq-kd"])
    ]
    assert 0 < caches[0] < caches[1]


def test_plan_refuses_a_method_without_formulas():
    options = ["--prompt-data-dir", "prompts", "--lm-data-dir="]
    with pytest.raises(UserError, match="--method minillm cannot be planned: choose one of promptkd"):
        make("--cpu", *options, method="minillm")


def test_gradient_bucket_is_no_larger_than_the_trained_parameters(tmp_path):
    """As in config.deepspeed.with_bucket_for: DeepSpeed's default of 5e8 elements would be 2 GB in float32."""
    for device in (["--cpu"], ["--gpus", "1", "--gpu", "a100"]):
        setting = make(*device, *zero(tmp_path, 1))
        memory = memory_of(setting)
        assert memory.phases["student"]["gradient bucket"] == 4 * setting.student.parameters
        assert memory.phases["prompt"]["gradient bucket"] == 4 * 7 * setting.teacher.shape.width
    setting = make("--cpu", *zero(tmp_path, 1, reduce_bucket_size=1000))
    assert memory_of(setting).phases["student"]["gradient bucket"] == 4000


def test_tensor_parallelism_divides_products():
    pair = {"student": "llama-7b", "teacher": "llama-13b"}
    options = ["--gpus", "4", "--gpu", "a100", "--max-length", "512", "--max-prompt-length", "256"]
    complete, cut = make(*options, **pair), make(*options, "--model-parallel", "--model-parallel-size", "2", **pair)
    assert memory_of(cut).held["weights of the teacher"] / memory_of(complete).held["weights of the teacher"] < 0.53
    assert cut.data_ranks(cut.student) == 2


def test_remedies_name_an_option_that_fits():
    lengths = ["--batch-size", "16", "--max-length", "512", "--max-prompt-length", "256"]
    setting = make("--gpus", "8", "--gpu", "3090", *lengths, student="gpt2-base", teacher="gpt2-xlarge")
    small = replace(setting, hardware=replace(setting.hardware, memory=12e9))
    assert not fits(small)
    listed = dict(remedies(small))
    budget = next(int(text.split()[1]) for text in listed if text.startswith("--token-budget"))
    assert fits(replace(small, token_budget=budget)) and not fits(replace(small, token_budget=2 * budget))
    assert not remedies(replace(setting, hardware=replace(setting.hardware, memory=1e9)))


def test_plan_text_agrees_with_json():
    setting = make("--cpu", "--ranks", "2", "--batch-size", "2", "--gpu-memory", "8GB", "--examples", "64")
    plan = plan_of(setting)
    assert json.loads(json.dumps(plan))["steps"] == 16 and plan["fits"] and plan["examples_per_step"] == 4
    text = text_of(plan, cpu=True)
    for word in ("rollout", "prompt", "student", "update", "key-value cache", "fits", f"{plan['peak'] / 1e9:.2f} GB"):
        assert word in text
    assert set(plan["phases"]) == {"rollout", "prompt", "student", "update", "evaluation"}


@pytest.mark.slow
def test_plan_script_needs_no_models_on_disk():
    command = [sys.executable, "tools/plan.py", "--script", "scripts/opt/promptkd/promptkd_1.3B.sh", "--gpus", "4"]
    done = subprocess.run([*command, "--gpu", "a100", "--json"], cwd=ROOT, capture_output=True, text=True)
    plan = json.loads(done.stdout)
    assert plan["models"]["teacher"]["config"] == "promptkd/configs/models/opt-13b" and plan["examples_per_step"] == 64


@pytest.mark.parametrize("text", ["24GB", "24 gb", "24G", "24e9", "24000000 kB"])
def test_parse_bytes_accepts_units(text):
    assert parse_bytes(text, "--x") == 24e9


def test_parse_bytes_binary_units_are_powers_of_1024():
    assert parse_bytes("16GiB", "--x") == 16 * 2**30


def broken(folder: Path, **changes: object) -> str:
    config = json.loads((Path(STUDENT) / "config.json").read_text())
    config.update(changes)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))
    return str(folder)


@pytest.mark.parametrize(
    "options, changes, message",
    [
        (["--cpu"], {"model_type": "gone"}, "config.json"),
        (["--cpu"], {"n_layer": 10**9}, "1000000000 layers are too many"),
        (["--cpu"], {"n_embd": 10**12, "n_head": 1}, "no model has these sizes"),
        (["--cpu"], {"n_head": 7}, "no model has these sizes"),
        (["--cpu"], {"n_layer": -1}, "n_layer is -1"),
        (["--cpu"], {"n_embd": "wide"}, "n_embd is 'wide'"),
        (["--cpu"], {"model_type": "rwkv"}, "rwkv"),
        (["--cpu"], {"n_positions": 64}, "positions"),
        (["--cpu", "--gpu-memory", "lots"], {}, "--gpu-memory lots"),
        (["--cpu", "--gpu-memory", "24GB/s"], {}, "24GB/s"),
        (["--cpu", "--gpu-memory", "1.2.3GB"], {}, "1.2.3GB"),
        (["--gpus", "2"], {}, "--gpu-memory is missing"),
        (["--cpu", "--ranks", "0"], {}, "--gpus 0"),
        (["--cpu", "--deepspeed_config", "nowhere.json"], {}, "nowhere.json"),
        (["--cpu", "--lrr", "1"], {}, "did you mean --lr"),
        (["--script", "nowhere.sh", "--cpu"], {}, "nowhere.sh"),
    ],
)
def test_plan_bad_input_is_one_line(options, changes, message, tmp_path):
    with pytest.raises(UserError) as error:
        make(*options, student=broken(tmp_path / "model", **changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_plan_unknown_model_lists_the_known_ones():
    with pytest.raises(UserError, match=r"bloom-3b is not a known model: use one of gpt2-base, .*opt-6\.7b"):
        make("--cpu", student="checkpoints/bloom-3b")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model-parallel", "--model-parallel-size", "8"], r"12 heads.*use 1 or 2 or 4$"),
        (["--model-parallel", "--model-parallel-size", "2"], r"25 heads.*use 1$"),
        (["--model-parallel-size", "2"], r"go together"),
    ],
)
def test_plan_lists_the_tensor_sizes_that_divide(options, message):
    with pytest.raises(UserError, match=message):
        make("--gpus", "8", "--gpu", "3090", *options, student="gpt2-base", teacher="gpt2-xlarge")
