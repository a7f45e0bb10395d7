"""The demo's data: every task right, splits apart, the same bytes again, models that train.py can use."""

from __future__ import annotations

import json
import random
import re
from itertools import combinations

import pytest
from helpers.training import ROOT, metrics_of, start, train_here

from promptkd.data.dataset import ExampleSet
from promptkd.errors import UserError
from promptkd.models.loading import load_causal_lm, load_tokenizer
from tools import make_demo

SMALL = ["--teacher-num", "120", "--train-num", "60", "--dev-num", "24", "--test-num", "36"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("demo"))


def make(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["make_demo.py", "--save", str(folder), *SMALL])
        make_demo.main()
    return folder


def rows_of(folder, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def drawn(task) -> list[tuple[str, str]]:
    rng = random.Random(3)
    return [task(rng) for _ in range(300)]


def test_make_demo_splits_do_not_overlap(made):
    sizes = {"teacher_data/train": 120, "teacher_data/valid": 24, "data/train": 60, "data/valid": 24, "test/valid": 36}
    asked = {name: [row["instruction"] for row in rows_of(made, name)] for name in sizes}
    assert {name: len(set(asked[name])) for name in asked} == sizes
    for one, two in combinations(["teacher_data/train", "data/valid", "test/valid"], 2):
        assert not set(asked[one]) & set(asked[two])
    assert asked["data/train"] == asked["teacher_data/train"][:60]
    assert {row["task"] for row in rows_of(made, "test/valid")} == {task.__name__ for task in make_demo.TASKS}


def test_make_demo_gives_preambles_to_the_teacher_only(made):
    for name in ("data/train", "data/valid", "test/valid"):
        assert all(row["prompt"].startswith("### Instruction:\n") for row in rows_of(made, name))
    before = {row["prompt"].partition("### ")[0].strip() for row in rows_of(made, "teacher_data/train")}
    assert before == {"", *make_demo.PREAMBLES}


def test_make_demo_is_reproducible(made, tmp_path):
    make(tmp_path)
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    for file in files:
        assert (made / file).read_bytes() == (tmp_path / file).read_bytes(), file


def test_make_demo_test_rows_do_not_depend_on_training_rows():
    few, many = (
        make_demo.make_data(make_demo.DemoSettings(teacher_num=n, train_num=50, test_num=24)) for n in (50, 500)
    )
    assert few["test/valid"] == many["test/valid"] and few["data/train"] == many["data/train"]


def test_make_demo_words_are_unambiguous():
    for groups in (make_demo.KINDS.values(), make_demo.RHYMES, make_demo.OPPOSITES):
        words = [word for group in groups for word in group]
        assert len(set(words)) == len(words)


def test_make_demo_answers_are_correct():
    for question, answer in drawn(make_demo.add):
        left, right = map(int, re.findall(r"\d+", question))
        assert answer == f"{left} plus {right} is {left + right}."
    for question, answer in drawn(make_demo.sort_numbers):
        assert answer.split() == sorted(question.partition(": ")[2].split())
    for question, answer in drawn(make_demo.count):
        word, listed = re.fullmatch(r"How often is (\w+) in this list: (.*)", question).groups()
        assert answer == f"{word} is there {make_demo.TIMES[listed.split().count(word) - 1]}."
    for question, answer in drawn(make_demo.compare):
        ages = {name: int(age) for name, age in re.findall(r"(\w+) is (\d+)", question)}
        assert answer == "{1} is older than {0}.".format(*sorted(ages, key=ages.get))
    for question, answer in drawn(make_demo.who_has):
        facts = re.findall(r"(\w+) has a (\w+) (\w+)", question)
        assert answer in [
            text for who, colour, what in facts for text in (f"{who} has the {what}.", f"The {what} is {colour}.")
        ]
        assert re.search(r"the (\w+)\?$", question)[1] in answer


def test_make_demo_answers_about_lists_are_correct():
    for question, answer in drawn(make_demo.reverse):
        assert answer.split()[::-1] == question.partition(": ")[2].split()
    for question, answer in drawn(make_demo.pick_position):
        place, listed = re.fullmatch(r"What is the (\w+) word: (.*)", question).groups()
        assert answer == f"The {place} word is {listed.split()[make_demo.ORDINALS.index(place)]}."
    for question, answer in drawn(make_demo.replace):
        old, new, listed = re.fullmatch(r"Replace (\w+) by (\w+): (.*)", question).groups()
        assert answer == re.sub(rf"\b{old}\b", new, listed) and old in listed
    for question, answer in drawn(make_demo.find_kind):
        kind, listed = re.fullmatch(r"Which of these is the (\w+): (.*)", question).groups()
        assert [f"The {kind} is {word}." for word in listed.split() if word in make_demo.KINDS[kind]] == [answer]
    for question, answer in drawn(make_demo.find_rhyme):
        word, listed = re.fullmatch(r"Which word rhymes with (\w+): (.*)", question).groups()
        family = next(family for family in make_demo.RHYMES if word in family)
        assert [f"{other} rhymes with {word}." for other in listed.split() if other in family] == [answer]


def test_make_demo_tokenizer_is_lossless(made):
    tokenizer = load_tokenizer(str(made / "models/student"))
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_token_id == 0
    for text in [row["prompt"] + row["output"] for row in rows_of(made, "teacher_data/train")] + ["Ünïcode 東京\t\n "]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    examples = ExampleSet.open(made / "teacher_data", "train", tokenizer, 48, 64)
    assert len(examples) == 120 and examples.counts.dropped == 0
    assert max(len(examples[i].response) for i in range(120)) <= 16


@pytest.mark.slow
def test_make_demo_models_share_the_vocabulary(made, tmp_path):
    import torch

    sizes = [load_causal_lm(str(made / "models" / n), torch.float32, "--model-path") for n in ("teacher", "student")]
    assert sizes[0].num_parameters() > 4 * sizes[1].num_parameters()
    argv = ["--method", "promptkd", "--model-path", str(made / "models/student"), "--save", str(tmp_path / "run")]
    argv += ["--teacher-model-path", str(made / "models/teacher"), "--data-dir", str(made / "data")]
    train_here([*argv, "--total-iters", "2", "--dev-num", "4", "--max-length", "64", "--max-prompt-length", "48"])
    assert len(metrics_of(tmp_path / "run")) == 2


def test_make_rows_names_an_exhausted_task(monkeypatch):
    monkeypatch.setattr(make_demo, "TASKS", [make_demo.repeat, lambda rng: ("What is this?", "A test.")])
    with pytest.raises(UserError, match="different instructions: lower --teacher-num"):
        make_demo.make_rows(10, 1)


def test_make_demo_refuses_bad_numbers(tmp_path):
    for option in (["--train-num", "0"], ["--train-num", "30", "--teacher-num", "20"], ["--vocab-size", "100"]):
        done = start(["--save", str(tmp_path / "x"), *option], script="tools/make_demo.py")
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "x").exists()


def test_demo_script_names_existing_options():
    script = (ROOT / "scripts/demo.sh").read_text()
    known = "".join(
        (ROOT / path).read_text()
        for path in (
            "promptkd/config/options.py",
            "promptkd/config/template_options.py",
            "promptkd/evaluation/options.py",
        )
    )
    known += "".join(
        (ROOT / path).read_text()
        for path in (
            "promptkd/training/run_folder.py",
            "promptkd/cli/report.py",
            "minillm_baselines/gkd.py",
            "minillm_baselines/minillm.py",
        )
    )
    for name in set(re.findall(r"(?<=[( ])--([a-z-]+)", script)) - {"fresh", "method"}:
        assert any(f"{each.replace('-', '_')}:" in known for each in (name, name.removeprefix("no-"))), name
