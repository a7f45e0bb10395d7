"""The small study's data: every part apart from the others, the students' rows narrower than the teacher's."""

from __future__ import annotations

import random

import pytest

from promptkd.errors import UserError
from tools import make_world


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
    held_out = {task.__name__ for task in make_world.HELD_OUT}
    assert {row["task"] for row in data["test/held_out/valid"]} == held_out
    assert not held_out & {row["task"] for row in data["data/train"] + data["test/test/valid"]}
    hard = {task.__name__ for task in make_world.HARD}
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
        (text, *_), (answer,) = make_world.reverse(rng, (3, 5))
        assert answer.split() == text.split(" : ")[1].split()[::-1]
        (text, *_), (answer,) = make_world.count(rng, (3, 5))
        word, words = text.removeprefix("how often is ").split(" in : ")
        assert answer == f"{word} is there {['never', 'once', 'twice', 'thrice'][words.split().count(word)]}"
        (text, *_), answers = make_world.name_one(rng, (3, 5))
        kind, words = text.removeprefix("name one ").split(" of : ")
        right = {f"{word} is one {kind}" for word in words.split() if word in make_world.KINDS[kind]}
        assert set(answers) == right
        (text, *_), (answer,) = make_world.swap(rng, (3, 5))
        words = text.split(" : ")[1].split()
        assert answer.split() == [words[-1], *words[1:-1], words[0]]


def test_too_many_rows_are_refused():
    with pytest.raises(UserError, match="lower"):
        make_world.make_data(settings(teacher_num=200_001))
