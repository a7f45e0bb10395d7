"""Chat templates that write the date get one time in a run, its resumption and an evaluation."""

from __future__ import annotations

import datetime
import json

import pytest
from helpers.training import GOLDEN, metrics_of, train_here
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils import chat_template_utils

import evaluate
from promptkd.config.template_options import TemplateSettings
from promptkd.data.rows import read_row
from promptkd.data.templates import ChatTemplate, bind_settings
from promptkd.errors import UserError
from promptkd.evaluation.evaluate import run as evaluate_run

DATED = (
    "{{ 'Today ' + strftime_now('%Y %m %d') + '\n' }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{{ '<|endoftext|>' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SIZES = ["--max-length", "96", "--max-prompt-length", "72"]


class Later(datetime.datetime):
    """A clock that is twelve days ahead."""

    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(days=12)


def make_tokenizer(template=DATED):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "models/gpt2_student")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def room(tmp_path):
    """Make data and a tiny model with a template that writes the date."""
    make_tokenizer().save_pretrained(tmp_path / "m")
    sizes = dict(vocab_size=1500, n_positions=128, n_embd=16, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "m")
    rows = [json.dumps({"instruction": f"List {i}.", "output": "learn data"}) + "\n" for i in range(8)]
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    return tmp_path


def test_bound_time_is_what_the_template_writes():
    tokenizer, settings = make_tokenizer(), TemplateSettings(template="chat")
    bind_settings(tokenizer, settings, "2024-02-29T12:00:00")
    assert settings.template_time == "2024-02-29T12:00:00"
    assert ChatTemplate(tokenizer)(read_row({"instruction": "Hi"})) == "Today 2024 02 29\nuser: Hi\nassistant: "
    assert chat_template_utils.datetime is datetime.datetime  # given back
    undated = TemplateSettings(template="chat")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    bind_settings(make_tokenizer(template), undated, "2024-02-29T12:00:00")
    assert undated.template_time is None
    with pytest.raises(UserError, match="does not write the time"):
        bind_settings(make_tokenizer(template), TemplateSettings("chat", template_time="2024-02-29T12:00:00"), "")


def test_resumed_run_writes_the_time_of_its_start(room, monkeypatch):
    how = ["--method", "sft", "--model-path", str(room / "m"), "--data-dir", str(room), "--template", "chat", *SIZES]
    how += ["--total-iters", "4", "--batch-size", "4", "--dev-num", "0", "--lr", "0.01", "--checkpoint-every", "2"]
    train_here([*how, "--save", str(room / "all"), "--keep-checkpoints", "9"])
    time = json.loads((room / "all/config.json").read_text())["settings"]["template_time"]
    state = json.loads((room / "all/checkpoints/step-4/state.json").read_text())
    assert state["identity"]["options"]["template_time"] == time and abs(
        datetime.datetime.fromisoformat(time) - datetime.datetime.now()
    ) < datetime.timedelta(minutes=10)
    whole = [row["loss"] for row in metrics_of(room / "all")]
    train_here([*how, "--save", str(room / "cut"), "--template-time", time, "--total-iters", "2"])
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    monkeypatch.setattr("promptkd.data.templates.datetime.datetime", Later)
    # Another length of the run is another setting, which --resume-anyway allows.
    train_here([*how, "--save", str(room / "cut"), "--resume", "--resume-anyway"])
    assert [row["loss"] for row in metrics_of(room / "cut")] == whole
    assert json.loads((room / "cut/config.json").read_text())["settings"]["template_time"] == time
    with pytest.raises(UserError, match=r"--template-time 2024-01-01T00:00:00 \(there: "):
        train_here(
            [*how, "--save", str(room / "cut"), "--resume", "--total-iters", "2", "--template-time", "2024-01-01"]
        )


def test_evaluation_records_its_time(room):
    argv = [
        "--model-path",
        str(room / "m"),
        "--data-dir",
        str(room),
        "--data-names",
        "own",
        "--template",
        "chat",
        *SIZES,
    ]
    given = ["--template", "chat", "--dev-num", "2", "--template-time", "2024-02-29", "--save", str(room / "eval")]
    evaluate_run(evaluate.read_settings([*argv, *given]))
    results = json.loads((room / "eval/results.json").read_text())
    assert results["run"]["template_time"] == "2024-02-29T00:00:00"
    assert results["sets"]["own"]["answers_with_thoughts"] == 0
