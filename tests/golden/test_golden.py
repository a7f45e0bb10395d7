"""The published code's numbers, step by step (tests/golden/README.md), and the window's invariances."""

import json

import pytest
from helpers.golden_cases import case_argv, compare
from helpers.training import GOLDEN, golden_argv, metrics_of, start, start_fresh, train_here

slow = pytest.mark.slow
CASES = ["sft_gpt2", "kd_gpt2", "promptkd_gpt2"]


@pytest.mark.parametrize("normalization", ["window", "micro-batch"])
@pytest.mark.parametrize("name", CASES)
def test_every_step_equals_the_recording(name, normalization, save):
    case = json.loads((GOLDEN / f"cases/{name}.json").read_text())
    train_here(case_argv(case, save, "--loss-normalization", normalization))
    compare(case, save)
    if normalization == "micro-batch":
        # As means of the batches' means; the published PromptKD does not evaluate before training.
        losses = [row["dev_loss"] for row in metrics_of(save, "eval")]
        first = 1 if case["options"]["method"] == "promptkd" else 0
        expected = case["dev_loss_after_epoch"]
        assert losses[first : first + len(expected)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", [case if "promptkd" in case else pytest.param(case, marks=slow) for case in CASES])
def test_through_torchrun(name, save):
    case = json.loads((GOLDEN / f"cases/{name}.json").read_text())
    done = start_fresh(case_argv(case, save), torchrun=True)
    assert done.returncode == 0, done.stderr
    compare(case, save)


def losses_of(save) -> list[list[float]]:
    return [[value for key, value in row.items() if key.endswith("loss")] for row in metrics_of(save)]


def run_shape(method: str, folder, batch: int, accumulation: int, *extra: str) -> list[list[float]]:
    save = folder / f"{batch}x{accumulation}{''.join(extra)}"
    shape = ["--batch-size", str(batch), "--gradient-accumulation-steps", str(accumulation)]
    # A response limit that the sampled answers do not all reach: the micro-batches' token counts differ.
    train_here(golden_argv(method, save, *shape, "--epochs", "1", *extra))
    return losses_of(save)


@pytest.mark.parametrize("method", [pytest.param("sft", marks=slow), pytest.param("kd", marks=slow), "promptkd"])
def test_accumulation_and_packing_do_not_change_the_step(method, tmp_path):
    whole = run_shape(method, tmp_path, 4, 1)
    assert len(whole) == 8  # 34 rows make 8 windows of 4 an epoch; the last 2 are dropped
    for batch, accumulation, *extra in [(2, 2), (1, 4), (2, 2, "--token-budget", "150")]:
        other = run_shape(method, tmp_path, batch, accumulation, *extra)
        for expected, values in zip(whole, other):
            assert values == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("method", ["sft", pytest.param("kd", marks=slow), "promptkd"])
def test_two_ranks_equal_one(method, tmp_path):
    steps = ["--total-iters", "6"]
    alone = run_shape(method, tmp_path, 2, 1, *steps)
    argv = golden_argv(method, tmp_path / "ranks", "--batch-size", "1", *steps)
    done = start(argv, ranks=2)
    assert done.returncode == 0, done.stderr
    for expected, values in zip(alone, losses_of(tmp_path / "ranks"), strict=True):
        assert values == pytest.approx(expected, abs=1e-6)
