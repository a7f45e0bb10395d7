"""Tensor parallelism: several ranks that hold a model together compute what one rank does."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.deepspeed_files import zero_file
from helpers.generating import STUDENT, generate_argv, generated
from helpers.golden_cases import case_argv, compare
from helpers.runs import Run, assert_same_run, rows_of, student_with_dropout, tiny_argv
from helpers.tiny_models import make_model, run
from helpers.training import GOLDEN, golden_argv, train_here
from safetensors.torch import load_file
from transformers import GPT2Config

from promptkd.config.deepspeed import CONFIGS
from promptkd.distributed.ranks import setup
from promptkd.errors import UserError
from promptkd.evaluation.evaluate import run as evaluate
from promptkd.models.loading import load_causal_lm
from promptkd.models.tensor_parallel import TensorParallelGroup, load_shard
from train import resolve

pytestmark = pytest.mark.distributed

# The loss does not depend on the keys' biases: their gradient is rounding alone, of which Adam makes steps of --lr.
IDLE = ("k_proj.bias", "c_attn.bias")
SHORT = ["--max-length", "104", "--total-iters", "4", "--dev-num", "4", "--clip-grad", "0.03"]
SIZES = ["--max-length", "104", "--max-prompt-length", "96"]


def together(size: int = 2, *extra: str) -> list[str]:
    return ["--model-parallel", "--model-parallel-size", str(size), *extra]


def run_on(ranks: int, argv: list[str], log: Path, script: str = "train") -> None:
    started = Run(argv, log, ranks, script)
    assert started.wait() == [0] * ranks, log.read_text()


def assert_like_one_rank(save: Path, one: Path) -> None:
    """Metrics and saved folders are those of another run but for rounding, which Adam makes more of."""
    for row, expected in zip(rows_of(save), rows_of(one), strict=True):
        assert row.pop("event") == expected.pop("event")
        assert row == pytest.approx(expected, abs=1e-5), row["step"]
    names = {path.name for path in (save / "last").iterdir()}
    assert names == {path.name for path in (one / "last").iterdir()} and "model.safetensors" in names
    for name in names - {"model.safetensors"}:
        assert (save / "last" / name).read_bytes() == (one / "last" / name).read_bytes(), name
    for file in ("last/model.safetensors", "prompt/adapter_model.safetensors"):
        tensors, others = load_file(save / file), load_file(one / file)
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            tolerance = 1e-2 if name.endswith(IDLE) else 1e-4
            torch.testing.assert_close(tensor, others[name], atol=tolerance, rtol=0, msg=name)
            assert name.endswith(IDLE) or (tensor - others[name]).abs().mean() < 1e-6, name


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Makes a tiny random model of a family with the golden models' tokenizer, once."""
    root = tmp_path_factory.mktemp("models")

    def make(kind: str, layers: int) -> Path:
        folder = root / f"{kind}{layers}"
        if not folder.exists():
            without = {"dropout": 0.0} if kind == "opt" else {}
            make_model(kind, folder, vocab_size=1500, num_hidden_layers=layers, **without)
            for file in STUDENT.glob("*token*"):
                shutil.copy(file, folder)
        return folder

    return make


@pytest.mark.parametrize("kinds, format", [(("opt", "opt"), "bin"), (("llama", "qwen2"), "safetensors")])
def test_each_family_trains_and_saves_as_on_one_rank(kinds, format, models, tmp_path):
    """Sampled rollouts, dev loss, answers and clipping too. The teacher is read from shards of another size."""
    student, teacher = models(kinds[0], 1), models(kinds[1], 2)
    argv = [*golden_argv("promptkd", tmp_path / "one"), "--model-path", str(student), *SHORT, "--batch-size", "2"]
    train_here([*argv, "--teacher-model-path", str(teacher)])
    sharded = shutil.copytree(teacher, tmp_path / "teacher")
    run(sharded, 1, 4, format=format)
    (sharded / "model.safetensors").unlink()
    argv = [*argv, "--teacher-model-path", str(sharded), "--save", str(tmp_path / "two"), *together()]
    run_on(2, argv, tmp_path / "log")
    assert_like_one_rank(tmp_path / "two", tmp_path / "one")
    assert max(row.get("grad_norm", 0) for row in rows_of(tmp_path / "two")) > 0.03  # --clip-grad did something
    load_causal_lm(str(tmp_path / "two/last"), torch.float32, "--model-path")


def test_the_recording_of_gpt2(tmp_path):
    case = json.loads((GOLDEN / "cases/promptkd_gpt2.json").read_text())
    run_on(2, case_argv(case, tmp_path / "run", *together()), tmp_path / "log")
    compare(case, tmp_path / "run")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run on one rank."""
    save = tmp_path_factory.mktemp("alone") / "run"
    train_here([*tiny_argv("promptkd", save), *SHORT, "--batch-size", "4"])
    return save


@pytest.mark.parametrize(
    "student, teacher, stage",
    [(1, 2, 1), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 2, 0), (2, 1, 2)))],
)
def test_together_with_data_parallelism(student, teacher, stage, alone, tmp_path):
    """Four ranks, two shares of the examples; also where student and teacher are held by groups of other sizes."""
    argv = [*tiny_argv("promptkd", tmp_path / "run"), *SHORT, "--batch-size", "2"]
    argv += together(student, "--teacher-model-parallel-size", str(teacher))
    run_on(4, [*argv, "--deepspeed_config", zero_file(tmp_path, stage)], tmp_path / "log")
    assert_like_one_rank(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """With dropout, which has to be the same on both ranks; then on more ranks, not bitwise."""
    student = student_with_dropout(tmp_path / "student")
    often = ["--checkpoint-every", "1", "--deepspeed_config", zero_file(tmp_path, 1, bf16=True)]

    def argv(save: str, *extra: str) -> list[str]:
        return [
            *tiny_argv("promptkd", tmp_path / save), "--model-path", str(student), *SHORT, "--batch-size", "2",
            *often, *together(), *extra,
        ]  # fmt: skip

    run_on(2, argv("whole"), tmp_path / "log")
    killed = Run(argv("cut"), tmp_path / "log", 2)
    killed.wait_for(lambda: (tmp_path / "cut/checkpoints/step-2").exists())
    killed.signal(signal.SIGKILL)
    killed.wait()
    shutil.copytree(tmp_path / "cut", tmp_path / "more")
    run_on(2, argv("cut", "--resume"), tmp_path / "log")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    run_on(4, argv("more", "--resume", "--batch-size", "1"), tmp_path / "log")
    last = rows_of(tmp_path / "more")[-1]
    assert last["step"] == 4 and last["dev_loss"] == pytest.approx(rows_of(tmp_path / "cut")[-1]["dev_loss"], abs=0.01)
    with pytest.raises(UserError, match="other model parallel sizes"):
        train_here([*tiny_argv("promptkd", tmp_path / "cut"), *SHORT, "--batch-size", "2", "--resume"])


def test_answers_are_those_of_one_rank(tmp_path):
    """evaluate.py and tools/generate.py, on two shares of two ranks each."""
    import evaluate as script

    argv = ["--model-path", str(STUDENT), "--data-dir", str(GOLDEN / "processed/dolly/full/gpt2"), *SIZES]
    argv += ["--data-names", "dolly", "--dev-num", "6", "--seeds", "1", "2"]
    evaluate(script.read_settings([*argv, "--save", str(tmp_path / "one")]))
    run_on(4, [*argv, "--save", str(tmp_path / "four"), *together()], tmp_path / "log", "evaluate")
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("answers.jsonl")]
    assert len(files) == 2
    for file in files:
        assert (tmp_path / "four" / file).read_text() == (tmp_path / "one" / file).read_text()
    expected = generated(tmp_path / "gold", "--gen-num", "6")
    argv = generate_argv(tmp_path / "gen", "--gen-num", "6", *together())
    run_on(4, argv, tmp_path / "log", "tools.generate")
    assert [json.loads(line) for line in (tmp_path / "gen/generated.jsonl").open()] == expected


def test_ranks_and_groups(tmp_path):
    run_on(4, [], tmp_path / "log", "test_tensor_parallel")


def main() -> None:
    """What each of four ranks of `test_ranks_and_groups` looks at."""
    ranks = setup(tp_size=2)
    world = ranks.world.dp_rank
    assert (ranks.dp_rank, ranks.tp_rank, ranks.dp_size, ranks.world.dp_size) == (world // 2, world % 2, 2, 4)
    assert ranks.broadcast_tp(torch.tensor([world])).item() == world // 2 * 2
    assert ranks.all_reduce_sum(torch.tensor([10**world])).item() == (101 if world % 2 == 0 else 1010)
    assert ranks.all_gather_objects([world]) == [world % 2, world % 2 + 2] and ranks.world.all_gather_objects(
        [world]
    ) == [0, 1, 2, 3]
    assert ranks.all_reduce_max(world) == 3 and ranks.is_main == (world == 0)
    for size, expected in ((2, (world % 2, world // 2, 2)), (4, (world, 0, 1))):
        group = TensorParallelGroup(ranks, size)
        assert (group.rank, group.data_rank, group.data_size) == expected
    ranks.barrier()  # the first one is not to leave while others make groups


@pytest.mark.parametrize(
    "extra, message",
    [
        (together(), "size 2 does not divide the 1 ranks"),
        (["--model-parallel"], "go together"),
        (["--model-parallel-size", "2"], "go together"),
        (together(0), "--model-parallel-size 0"),
        (["--teacher-model-parallel-size", "2"], "needs --model-parallel"),
        (together(2, "--teacher-model-parallel-size", "3"), "has to divide the other"),
    ],
)
def test_sizes_that_cannot_be(extra, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train_here([*tiny_argv("promptkd", tmp_path / "run"), *extra])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "method, config, message",
    [
        ("promptkd", "ds_config_zero3_fp32.json", "ZeRO-3"),
        ("sft", "ds_config_fp32.json", "has no teacher"),
    ],
)
def test_tensor_parallelism_refuses_options(method, config, message, tmp_path):
    argv = [*tiny_argv(method, tmp_path), *together(1, "--teacher-model-parallel-size", "2")]
    with pytest.raises(UserError, match=message):
        resolve([*argv, "--deepspeed_config", str(CONFIGS / config)])


@pytest.mark.parametrize(
    "kind, size, message",
    [
        ("opt", 3, r"--teacher-model-parallel-size 3 does not divide the model's 4 attention heads; .*: 1, 2, 4"),
        ("qwen2", 8, "4 key-value heads; sizes that would: 1, 2, 4"),
        ("gpt2", 5, "4 attention heads and 128 feed-forward units"),
    ],
)
def test_a_size_that_does_not_fit_the_model(kind, size, message, models):
    with pytest.raises(UserError, match=message):
        load(models(kind, 1), size)


def load(folder: Path, size: int):
    return load_causal_lm(str(folder), torch.float32, "--teacher-model-path", group=SimpleNamespace(size=size, rank=0))


def test_weights_that_cannot_be(models, tmp_path):
    folder = shutil.copytree(models("llama", 1), tmp_path / "model")
    run(folder, 1, 2)
    (folder / "model.safetensors").unlink()
    assert load(folder, 4).model.layers[0].mlp.down_proj.weight.shape == (32, 12)
    (folder / "mp2/model_1.safetensors").unlink()
    with pytest.raises(UserError, match=r"model_1.safetensors is missing"):
        load(folder, 2)
    with pytest.raises(UserError, match="needs a folder"):
        load_shard("openai/gpt2", GPT2Config(), torch.float32, SimpleNamespace(size=2, rank=0), "--model-path")
