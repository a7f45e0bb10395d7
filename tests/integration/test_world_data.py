"""The small study's data: every part apart from the others, the students' rows narrower than the teacher's."""

from __future__ import annotations

import random
import re

import pytest
import torch
from helpers.training import ROOT

from promptkd.data.dataset import ExampleSet
from promptkd.errors import UserError
from promptkd.models.loading import load_causal_lm, load_tokenizer
from tools import make_world, world_tasks


def settings(**numbers: int) -> make_world.WorldSettings:
    return make_world.WorldSettings(**{"teacher_num": 600, "train_num": 100, "dev_num": 30, "test_num": 30} | numbers)


@pytest.fixture(scope="module")
def data():
    return make_world.make_data(settings())


def test_parts_share_no_instruction_but_the_students_rows(data):
    parts = {name: {row["instruction"] for row in rows} for name, rows in data.items() if name != "teacher_data/train"}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values()))
    teacher = {row["instruction"] for row in data["teacher_data/train"]}
    assert parts["data/train"] <= teacher
    assert not teacher & set.union(*(texts for name, texts in parts.items() if name != "data/train"))


def test_students_rows_lack_what_the_other_test_sets_have(data):
    held_out = {task.__name__ for task in world_tasks.HELD_OUT}
    assert {row["task"] for row in data["test/held_out/valid"]} == held_out
    assert not held_out & {row["task"] for row in data["data/train"] + data["test/test/valid"]}
    hard = {task.__name__ for task in world_tasks.HARD}
    shares = [sum(row["task"] in hard for row in data[f"test/{name}/valid"]) / 30 for name in ("test", "mix")]
    assert shares[0] < 0.45 < 0.6 < shares[1]
    for row in data["test/long/valid"]:
        assert len(row["prompt"].split()) > 6


def test_same_seed_makes_the_same_rows(data):
    assert make_world.make_data(settings()) == data
    assert make_world.make_data(settings(seed=2)) != data


def test_tasks_have_the_right_answers():
    rng = random.Random(4)
    for _ in range(60):
        (text, *_), (answer,) = world_tasks.reverse(rng, (3, 5))
        assert answer.split() == text.split(" : ")[1].split()[::-1]
        (text, *_), (answer,) = world_tasks.count(rng, (3, 5))
        word, words = text.removeprefix("how often is ").split(" in : ")
        assert answer == f"{word} is there {['never', 'once', 'twice', 'thrice'][words.split().count(word)]}"
        (text, *_), answers = world_tasks.name_one(rng, (3, 5))
        kind, words = text.removeprefix("name one ").split(" of : ")
        right = {f"{word} is one {kind}" for word in words.split() if word in world_tasks.KINDS[kind]}
        assert set(answers) == right
        (text, *_), (answer,) = world_tasks.swap(rng, (3, 5))
        words = text.split(" : ")[1].split()
        assert answer.split() == [words[-1], *words[1:-1], words[0]]


def test_too_many_rows_are_refused():
    with pytest.raises(UserError, match="lower"):
        make_world.make_data(settings(teacher_num=200_001))


def test_files_are_reproducible_and_fit_together(tmp_path, monkeypatch):
    sizes = ["--teacher-num", "120", "--train-num", "60", "--dev-num", "24", "--test-num", "36"]
    for name in ("one", "two"):
        monkeypatch.setattr("sys.argv", ["make_world.py", "--save", str(tmp_path / name), *sizes])
        make_world.main()
    one, two = (sorted(path for path in (tmp_path / n).rglob("*") if path.is_file()) for n in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two] and len(one) > 20
    world = tmp_path / "one"
    tokenizer = load_tokenizer(str(world / "models/small"))
    examples = ExampleSet.open(world / "teacher_data", "train", tokenizer, 34, 48)
    assert len(examples) == 180 and examples.counts.dropped == 0
    models = [load_causal_lm(str(world / "models" / n), torch.float32, "--model-path") for n in make_world.SIZES]
    counts = [model.num_parameters() for model in models]
    assert counts[0] > 10 * counts[1] and counts[1:] == sorted(counts[1:])


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
    for name in set(re.findall(r"(?<=[( ])--([a-z-]+)", script)) - {"fresh", "help", "method"}:
        assert any(f"{each.replace('-', '_')}:" in known for each in (name, name.removeprefix("no-"))), name
