"""The recipe with a real model, on a tiny one: chat template, pruned student, and the scripts' stages."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.smollm2 import run
from helpers.tokenizer_kinds import byte_level
from helpers.training import GOLDEN, ROOT, metrics_of, train_here
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import evaluate
import train
from promptkd.cli import data as process_data
from promptkd.cli import generate
from promptkd.data.dataset import ExampleSet
from promptkd.data.rows import read_row, render_prompt
from promptkd.data.templates import ChatTemplate
from promptkd.errors import UserError
from promptkd.evaluation.test_sets import read_set
from promptkd.models.loading import load_causal_lm, load_tokenizer
from promptkd.utils.jsonl import read_jsonl
from tools import convert_gguf, prune_layers

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
ROWS = [{"instruction": f"Say {i}", "input": "twice" if i % 2 else "", "output": f"{i} {i}"} for i in range(12)]
SIZES = ["--max-length", "96", "--max-prompt-length", "72"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny random Llama of six layers whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "models/gpt2_student")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=6)
    vocabulary = load_causal_lm(str(GOLDEN / "models/gpt2_student"), torch.float32, "").config.vocab_size
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(teacher, tmp_path_factory):
    """raw/ with the rows, data/ with their token files, pseudo/ with the teacher's answers to them."""
    root = tmp_path_factory.mktemp("data")
    for name in ("raw/raw", "raw/train", "raw/valid"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    how = ["--tokenizer", teacher, "--max-prompt-length", 72]
    made = ["--raw", root / "raw/raw.jsonl", "--save", root / "data", "--dev-num", 4, "--workers", 1]
    run(process_data, "instructions", "--template", "chat", *how, *made)
    answering = ["--model-path", str(teacher), "--data-dir", str(root / "data"), "--save", str(root / "gen"), *SIZES]
    generate.run(generate.read_settings(answering))
    made = ["--generated", root / "gen/generated.jsonl", "--data-dir", root / "data", "--save", root / "pseudo"]
    run(process_data, "pseudo", *how, *made)
    return root


def test_processing_training_and_evaluation_ask_alike(teacher, data):
    tokenizer = load_tokenizer(str(teacher))
    asked = "<|user|> Say 1\n\ntwice\n<|assistant|> "
    assert read_jsonl(data / "data/valid.jsonl")[1]["prompt"] == asked
    tokens = ExampleSet.open(data / "data", "valid", tokenizer, 72, 96)
    texts = ExampleSet.open(data / "raw", "valid", tokenizer, 72, 96, limit=4, template="chat")
    tests = read_set("own", data / "raw/valid.jsonl", tokenizer, 72, 4, False, "chat")
    for token, text, prompt in zip(tokens, texts, tests.prompts):
        assert token.prompt.tolist() == text.prompt.tolist() == prompt.tolist()
        assert token.response.tolist() == text.response.tolist()
    assert tokenizer.decode(tokens[1].prompt) == asked
    again = read_set("own", data / "data/valid.jsonl", tokenizer, 72, 4, False, "chat")  # its prompts are ready
    assert [p.tolist() for p in again.prompts] == [p.tolist() for p in tests.prompts]
    with pytest.raises(UserError, match="token file are ready: leave --template out"):
        ExampleSet.open(data / "data", "valid", tokenizer, 72, 96, template="chat")


def test_special_tokens_come_from_the_chat_template_alone(data):
    tokenizer = byte_level(begins=True)
    tokenizer.chat_template = CHAT
    for template, begins in (("chat", False), ("published", True)):
        prompts = read_set("own", data / "raw/valid.jsonl", tokenizer, 72, 4, False, template).prompts
        assert [prompt[0] == tokenizer.bos_token_id for prompt in prompts] == [begins] * 4


def test_what_a_row_says_to_a_chat_model(teacher):
    template = ChatTemplate(load_tokenizer(str(teacher)))

    def chat(row, where="row"):
        return template(read_row(row, where), where)

    published = render_prompt(read_row(ROWS[1]))
    assert chat({"prompt": published, **ROWS[1]}) == chat(ROWS[1])
    assert chat({"prompt": "Hello", "response": "Hi"}) == "<|user|> Hello\n<|assistant|> "
    assert chat({"prompt": chat(ROWS[1])}) == chat(ROWS[1])
    with pytest.raises(UserError, match='row 3: it has neither "instruction" nor "prompt"'):
        chat({"question": "?"}, "row 3")
    with pytest.raises(UserError, match="has no chat template"):
        ChatTemplate(load_tokenizer(str(GOLDEN / "models/gpt2_student")))


def test_prune_layers_keeps_the_teachers_layers_and_the_student_trains(teacher, data, tmp_path):
    assert prune_layers.dropped_layers(30, 20) == list(range(9, 19))
    assert prune_layers.dropped_layers(6, 4) == [1, 2]
    run(prune_layers, "--model-path", teacher, "--keep", 4, "--save", tmp_path / "student")
    whole, student = (AutoModelForCausalLM.from_pretrained(folder) for folder in (teacher, tmp_path / "student"))
    kept = [whole.model.layers[layer] for layer in (0, 3, 4, 5)]
    assert len(student.model.layers) == student.config.num_hidden_layers == 4
    for theirs, ours in zip(kept, student.model.layers):
        assert torch.equal(theirs.mlp.up_proj.weight, ours.mlp.up_proj.weight)
    with pytest.raises(UserError, match="--keep 6: the model has 6 layers"):
        prune_layers.dropped_layers(6, 6)
    with pytest.raises(UserError, match=r"--drop \[2, 6\]: give different layers from 0 to 5"):
        prune_layers.prune(whole, [2, 6])
    with pytest.raises(UserError, match="already holds a model"):
        run(prune_layers, "--model-path", teacher, "--keep", 4, "--save", tmp_path / "student")
    models = ["--model-path", str(tmp_path / "student"), "--teacher-model-path", str(teacher), *SIZES]
    how = ["--lr", "0.001", "--total-iters", "2", "--batch-size", "4", "--dev-num", "2", "--keep-checkpoints", "0"]
    argv = ["--method", "promptkd", "--data-dir", str(data / "raw"), "--template", "chat"]
    train_here([*argv, *models, *how, "--save", str(tmp_path / "run")])
    rows = metrics_of(tmp_path / "run")
    assert len(rows) == 2 and all(row["student_loss"] > 0 for row in rows)
    sizes = json.loads((tmp_path / "run/config.json").read_text())["parameters"]
    assert sizes["teacher"] == whole.num_parameters() > sizes["student"] and sizes["prompt"] == 7 * 32


def test_seqkd_data_keep_the_chat_prompts(data):
    prompts = {row["prompt"] for row in read_jsonl(data / "data/train.jsonl")}
    assert {row["prompt"] for row in read_jsonl(data / "pseudo/train.jsonl")} == prompts and len(prompts) == 8


def test_convert_gguf_refuses_other_files(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"no model")
    with pytest.raises(UserError, match="this is not a GGUF file"):
        run(convert_gguf, "--gguf", tmp_path / "model.gguf", "--save", tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        run(convert_gguf, "--gguf", tmp_path / "none.gguf", "--save", tmp_path / "out")


FAKE = """#!/usr/bin/env bash
# Stands in for Python: writes down what it was asked and makes the files that the scripts read.
printf '%q ' "$@" >>"$LOG"; echo >>"$LOG"
while [ $# -gt 1 ]; do
    if [ "$1" = --save ]; then mkdir -p "$2/data" && touch "$2"/{,data/}{train,valid}.jsonl; fi
    shift
done
"""


def recipe(out: Path, *options: str, script: str = "run.sh", **variables: str) -> list[list[str]]:
    """The commands that a recipe's script gives to Python."""
    fake, log = out.parent / "python", out.parent / "log"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    log.unlink(missing_ok=True)
    given = {"PROMPTKD_PYTHON": str(fake), "LOG": str(log), "OUT": str(out), **variables}
    command = ["bash", str(ROOT / "scripts/smollm2" / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **given}, timeout=60)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in log.read_text().splitlines()]


def names(commands: list[list[str]]) -> list[str]:
    """The folder each command saves to; pip saves to none."""
    return [Path(words[words.index("--save") + 1]).name for words in commands if "--save" in words]


def test_the_scripts_run_each_stage_once_and_again_where_something_changed(tmp_path):
    out = tmp_path / "out"
    methods = ["sft", "kd", "seqkd", "minillm", "promptkd"]
    commands = recipe(out, "--weight-decay", "0")
    prepared = ["teacher", "student", "exercises", "data", "answers", "pseudo", "start"]
    evaluated = ["eval", *["eval", "exposure_bias"] * 6, "out"]
    assert names(commands) == [*prepared, *methods, *evaluated]
    assert commands[0][:3] == ["-m", "pip", "install"]
    trained = [words for words in commands if words[0] == "train.py"]
    assert [words[-2:] for words in trained[1:]] == [["--weight-decay", "0"]] * 5
    assert names(recipe(out, "--weight-decay", "0")) == ["out"]  # the report alone
    assert names(recipe(out, "--weight-decay", "0", SEEDS="1 2")) == [*["eval"] * 7, "out"]
    changed = recipe(out, "--weight-decay", "1", METHODS="sft", SEEDS="1 2")
    assert names(changed) == ["sft", "eval", "exposure_bias", "out"]
    without = recipe(out, METHODS="kd promptkd", script="evaluate.sh")[-1]
    baselines = [words[words.index("--baseline") + 1] for words in (commands[-1], without)]
    assert baselines == ["sft", "kd"], "the report knows no result that was not trained"


def test_the_scripts_options_are_options(tmp_path):
    given = {"DATA": str(GOLDEN / "data/raw.jsonl"), "DATA_ROOT": str(tmp_path), "MODEL": str(tmp_path / "other")}
    commands = recipe(tmp_path / "out", STEPS="7", BATCH="2", **given)
    assert "convert_gguf.py" not in str(commands) and "tools.make_world" not in str(commands)
    readers = {
        "train.py": train.read_settings,
        "evaluate.py": evaluate.read_settings,
        "tools/generate.py": generate.read_settings,
    }
    read = []
    for script, *argv in commands:
        if script in readers and "exposure_bias" not in argv:
            read.append((script, readers[script](argv)))
    runs = [settings for script, settings in read if script == "train.py"]
    assert [settings.method for settings in runs] == ["sft", "sft", "kd", "seqkd", "minillm", "promptkd"]
    assert {settings.optimizer.total_iters for settings in runs[1:]} == {7}
    assert {settings.models.model_path for settings in runs[1:]} == {str(tmp_path / "out/start/last")}
    tests = [settings for script, settings in read if script == "evaluate.py"]
    assert {settings.data.template for settings in tests} == {"chat"} and len(tests[0].evaluation.seeds) == 3
