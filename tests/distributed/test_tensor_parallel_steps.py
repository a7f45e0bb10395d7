"""OPT and Llama, of which no recordings are given: two ranks against plain torch, which meets GPT-2's recording."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.generating import STUDENT, TEACHER, generate_argv
from helpers.golden_cases import case_argv
from helpers.plain_promptkd import Plain, greedy, steps
from helpers.runs import Run
from helpers.tiny_models import make_model
from helpers.training import GOLDEN, metrics_of

from promptkd.data.dataset import ExampleSet
from promptkd.models.loading import load_tokenizer
from promptkd.utils.jsonl import read_jsonl

pytestmark = pytest.mark.distributed

CASE = json.loads((GOLDEN / "cases/promptkd_gpt2.json").read_text())
TOTAL = len(CASE["steps"])
FULL = GOLDEN / "processed/dolly/full/gpt2"
TOGETHER = ["--model-parallel", "--model-parallel-size", "2"]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    examples = ExampleSet.open(FULL, "train", load_tokenizer(str(STUDENT)), 96, 128)
    return [examples[i].prompt.tolist() for i in range(len(examples))]


def plain(student: Path, teacher: Path, prompts: list[list[int]], total: int, run: int) -> Plain:
    return steps(student, teacher, prompts, CASE["options"], total, run)


def assert_equal(rows: list[dict], expected: list[dict]) -> None:
    assert len(rows) == len(expected)
    for step, (row, theirs) in enumerate(zip(rows, expected), start=1):
        for name, loss in theirs.items():
            assert row[name] == pytest.approx(loss, abs=1e-5), f"step {step}, {name}"


def test_the_plain_steps_are_those_of_the_recording(prompts):
    made = plain(STUDENT, TEACHER, prompts, TOTAL, 6)
    expected = [{name: step[name] for name in made.losses[0]} for step in CASE["steps"]]
    assert_equal(made.losses, expected[:6])


@pytest.mark.parametrize("family", ["opt", pytest.param("llama", marks=pytest.mark.slow)])
def test_two_ranks_step_and_answer_as_plain_torch_does(family, prompts, tmp_path):
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    for folder, layers in ((student, 2), (teacher, 3)):
        without = {"dropout": 0.0} if family == "opt" else {}
        make_model(family, folder, vocab_size=1500, num_hidden_layers=layers, **without)
        for file in STUDENT.glob("*token*"):
            shutil.copy(file, folder)
    made = plain(student, teacher, prompts, total=5, run=5)
    save, models = tmp_path / "run", ["--model-path", str(student), "--teacher-model-path", str(teacher)]
    log = tmp_path / "log"
    trained = Run([*case_argv(CASE, save, *models, *TOGETHER), "--total-iters", "5"], log, ranks=2)
    assert trained.wait() == [0, 0], log.read_text()
    assert_equal(metrics_of(save), made.losses)
    assert len({token for answers in made.answers for answer in answers for token in answer}) > 5  # no mere repeating
    argv = generate_argv(tmp_path / "answers", "--model-path", str(save / "last"), "--gen-num", "4", "--no-do-sample")
    assert Run([*argv, *TOGETHER], log, ranks=2, script="tools.generate").wait() == [0, 0], log.read_text()
    tokenizer = load_tokenizer(str(STUDENT))
    for row in read_jsonl(tmp_path / "answers/generated.jsonl"):
        answer = greedy(made.student, tokenizer(row["prompt"])["input_ids"], 32, tokenizer.eos_token_id)
        assert row["gen_answer"] == tokenizer.decode(answer, skip_special_tokens=True).strip()
