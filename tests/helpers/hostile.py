"""Calls with hostile input, and what has to come of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

import evaluate
import train
from helpers.hostile_damage import FULL, GOOD_ROW, SIZES
from helpers.made_results import make_result
from helpers.training import GOLDEN, train_here
from promptkd.cli import convert as convert_mp
from promptkd.cli import data as process_data
from promptkd.cli import generate, report
from promptkd.downloads.catalog import load_catalog
from promptkd.errors import exit_with
from promptkd.models.soft_prompt import load_prompt
from tools import make_world

LONGEST = 2.0  # seconds, where no model must be loaded
TOO_LONG = 20
LOADS_MODELS = {"train", "plain", "chat", "minillm", "resume", "anew", "evaluate", "generate"}


def training(room: Path, *options: str) -> list[str]:
    return ["--model-path", f"{room}/student", "--dev-num", "2", "--total-iters", "3", *SIZES, *options]


def arguments(entry: str, room: Path) -> list[str]:
    """The command line with which a script reads the room."""
    teacher = ["--teacher-model-path", f"{room}/teacher"]
    tokenizer = ["--tokenizer", f"{room}/student", "--save", f"{room}/out"]
    corpus = ["--prompt-data-dir", f"{room}/prompts", "--lm-data-dir", f"{room}/corpus"]
    answers = ["--model-path", f"{room}/student", *SIZES, "--save"]
    return {
        "train": lambda: training(
            room, "--method", "promptkd", *teacher, "--data-dir", f"{room}/data", "--save", f"{room}/out",
            "--deepspeed_config", f"{room}/ds.json", "--teacher-deepspeed-config", f"{room}/teacher_ds.json",
        ),
        "plain": lambda: training(room, "--method", "sft", "--data-dir", f"{room}/text", "--save", f"{room}/out"),
        "minillm": lambda: training(room, "--method", "minillm", *teacher, *corpus, "--save", f"{room}/out"),
        "chat": lambda: [*arguments("plain", room), "--template", "chat"],
        "resume": lambda: resumed(room, "--resume"),
        "anew": lambda: resumed(room, "--overwrite"),
        "evaluate": lambda: [*answers, f"{room}/out", "--data-dir", f"{room}/text", "--data-names", "own"],
        "generate": lambda: [*answers, f"{room}/gen", "--data-dir", f"{room}/text"],
        "instructions": lambda: ["instructions", "--raw", f"{room}/raw.jsonl", "--dev-num", "1", *tokenizer],
        "corpus": lambda: ["corpus", "--raw", f"{room}/raw.txt", "--dev-num", "1", "--max-length", "8", *tokenizer],
        "pseudo": lambda: [
            "pseudo", "--generated", f"{room}/generated.jsonl", "--data-dir", f"{room}/data", *tokenizer
        ],
        "join": lambda: ["--input_path", f"{room}/mp", "--source_mp_size", "2", "--target_mp_size", "1"],
        "split": lambda: ["--input_path", f"{room}/student", "--target_mp_size", "2"],
        "report": lambda: [f"{room}/sft", f"{room}/kd", "--save", f"{room}/out"],
        "world": lambda: ["--save", f"{room}/out"],
        "prompt": lambda: [f"{room}/prompt"],
        "downloads": lambda: [f"{room}/downloads.json"],
    }[entry]()  # fmt: skip


def resumed(room: Path, *options: str) -> list[str]:
    return training(
        room, "--method", "promptkd", "--teacher-model-path", f"{room}/teacher", "--data-dir", f"{room}/data",
        "--save", f"{room}/run", "--checkpoint-every", "1", "--keep-checkpoints", "1", "--total-iters", "2", *options,
    )  # fmt: skip


MAINS = {
    **dict.fromkeys(("train", "plain", "chat", "minillm", "resume", "anew"), train.main),
    **dict.fromkeys(("instructions", "corpus", "pseudo"), process_data.main),
    **dict.fromkeys(("join", "split"), convert_mp.main),
    "evaluate": evaluate.main,
    "generate": generate.main,
    "report": report.main,
    "world": make_world.main,
    "prompt": lambda: load_prompt(Path(sys.argv[1]), width=64, prompt_len=7),
    "downloads": lambda: load_catalog(Path(sys.argv[1])),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A folder with one good input of each kind."""
    room = tmp_path_factory.mktemp("template")
    for name in ("student", "teacher"):
        shutil.copytree(GOLDEN / f"models/gpt2_{name}", room / name)
    for name, source in (("data", FULL), ("prompts", GOLDEN / "processed/dolly/prompt/gpt2"),
                         ("corpus", GOLDEN / "processed/corpus/gpt2")):  # fmt: skip
        shutil.copytree(source, room / name)
    shutil.copytree(GOLDEN / "mp/opt", room / "mp")
    shutil.copyfile(GOLDEN / "models/opt_teacher/config.json", room / "mp/config.json")
    for name in ("ds.json", "teacher_ds.json"):
        shutil.copyfile(GOLDEN.parents[1] / "configs/deepspeed/ds_config_fp32.json", room / name)
    shutil.copyfile(GOLDEN.parents[1] / "configs/downloads.json", room / "downloads.json")
    (room / "text/own").mkdir(parents=True)
    for place in ("text/train.jsonl", "text/valid.jsonl", "text/own/valid.jsonl", "raw.jsonl"):
        (room / place).write_text(f"{json.dumps(GOOD_ROW)}\n" * 12)
    (room / "raw.txt").write_text("One line of text.\n" * 12)
    said = [json.loads(line) for line in (FULL / "train.jsonl").read_text().splitlines()]
    generated = [json.dumps({"prompt": row["prompt"], "gen_answer": "an answer"}) for row in said]
    (room / "generated.jsonl").write_text("\n".join(generated) + "\n")
    (room / "gen").mkdir()
    for name in ("sft", "kd"):
        make_result(room, name)
    trainer = train_here(resumed(room))
    shutil.copytree(room / "run/prompt", room / "prompt")
    trainer.checkpoints.unlock()
    return room


def snapshot(room: Path) -> dict[str, str]:
    """What a folder holds; of files a digest."""
    found = {}
    for where, folders, files in os.walk(room):
        for name in folders + files:
            path = Path(where, name)
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            found[str(path.relative_to(room))] = digest + (os.readlink(path) if path.is_symlink() else "")
    return found


def refused(entry: str, argv: list[str], room: Path, monkeypatch, capfd) -> str:
    """Run a script in this process; the line it says."""
    before = snapshot(room)
    monkeypatch.setattr(sys, "argv", [f"{entry}.py", *argv])
    monkeypatch.chdir(room)
    capfd.readouterr()
    began = time.process_time()  # of this process: other work on the machine does not count
    signal.alarm(TOO_LONG)  # ends this test alone
    try:
        with pytest.raises(SystemExit) as ended:
            exit_with(MAINS[entry])
    finally:
        signal.alarm(0)
    took = time.process_time() - began
    said = capfd.readouterr().err
    assert ended.value.code == 2, said
    assert said.count("\n") == 1 and said.endswith("\n") and "Traceback" not in said, said
    assert snapshot(room) == before, said
    assert took < LONGEST or entry in LOADS_MODELS, took
    return said


@pytest.fixture
def room(template, tmp_path) -> Path:
    shutil.copytree(template, tmp_path / "room", symlinks=True)
    return tmp_path / "room"
