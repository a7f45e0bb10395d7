"""A trained model records how its prompts were made. Dropped and changed rows are counted and reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tokenizer_kinds import byte_level
from helpers.training import GOLDEN, train_here
from transformers import LlamaConfig, LlamaForCausalLM

import evaluate
from promptkd.cli import data as process_data
from promptkd.cli import generate
from promptkd.cli.data import PseudoSettings, pseudo
from promptkd.data.prompt_format import PromptFormat, choose_rule, mismatch, read_format
from promptkd.evaluation.evaluate import run as evaluate_run
from promptkd.evaluation.exposure_bias import run as exposure_bias
from promptkd.models.loading import load_tokenizer

SIZES = ["--max-length", "120", "--max-prompt-length", "100"]
ROWS = [{"instruction": f"List {i} words.", "output": "learn data"} for i in range(8)]


def put(folder: Path, rows=ROWS) -> Path:
    folder.mkdir(exist_ok=True)
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose tokenizer begins texts with <s> and has a chat template."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level(begins=True, chat=True)
    tokenizer.save_pretrained(folder)
    sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """Return the folder of a run for each template."""
    root = tmp_path_factory.mktemp("runs")
    data = put(root / "data")

    def train(template: str, *extra: str) -> Path:
        save = root / template
        argv = ["--method", "sft", "--model-path", str(model), "--data-dir", str(data), "--save", str(save), *SIZES]
        train_here([*argv, "--template", template, "--total-iters", "1", "--no-eval-gen", *extra])
        return save

    return {template: train(template) for template in ("published", "chat")}


def evaluated(path: Path, data: Path, save: Path, *extra: str) -> dict:
    argv = ["--model-path", str(path), "--data-dir", str(data), "--data-names", "own", "--save", str(save)]
    evaluate_run(evaluate.read_settings([*argv, *SIZES, "--dev-num", "2", *extra]))
    return json.loads((save / "results.json").read_text())


@pytest.mark.parametrize("then", ["published", "chat"])
@pytest.mark.parametrize("now", ["published", "chat"])
def test_evaluation_warns_of_another_template(trained, tmp_path, capsys, then, now):
    place = trained[then] / "last"
    assert read_format(str(place)) == PromptFormat(then, "own") == read_format(str(trained[then] / "best_loss"))
    evaluated(place, put(tmp_path / "own"), tmp_path / "out", "--template", now)
    said = [line for line in capsys.readouterr().err.splitlines() if "template" in line]
    if then == now:
        assert not said
    else:
        assert said == [
            f"evaluate.py: warning: --model-path {place} was trained on prompts of --template {then} and not {now}: "
            "answers suffer where prompts differ (promptkd.json)"
        ]


def test_read_format_of_other_models_is_none(model, tmp_path, capsys):
    assert read_format(str(model)) is None and read_format("gpt2") is None
    evaluated(model, put(tmp_path / "own"), tmp_path / "out", "--template", "chat")
    assert "warning" not in capsys.readouterr().err


def test_ready_prompts_have_the_template_they_look_like(model, trained, tmp_path, capsys):
    """Data processed with --template chat needs no option in training and evaluation."""
    raw = put(tmp_path / "raw") / "train.jsonl"
    made = ["--raw", str(raw), "--tokenizer", str(model), "--save", str(tmp_path / "own"), "--dev-num", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["x", "instructions", *made, "--template", "chat", "--workers", "1"])
        process_data.main()
    argv = ["--method", "sft", "--model-path", str(model), "--data-dir", str(tmp_path / "own"), "--no-eval-gen", *SIZES]
    train_here([*argv, "--save", str(tmp_path / "run"), "--total-iters", "1", "--batch-size", "2"])
    assert read_format(str(tmp_path / "run/last")) == PromptFormat("chat", "own")
    evaluated(tmp_path / "run/last", tmp_path / "own", tmp_path / "out")
    assert "warning" not in capsys.readouterr().err
    for name, warns in (("chat", False), ("published", True)):
        argv = ["--model-path", str(trained[name] / "last"), "--data-dir", str(tmp_path / "own"), *SIZES]
        generate.run(generate.read_settings([*argv, "--save", str(tmp_path / f"gen-{name}"), "--gen-num", "1"]))
        assert ("generate.py: warning" in capsys.readouterr().err) == warns


def test_exposure_bias_warns_of_either_model(trained, tmp_path, capsys):
    student, teacher = (str(trained[name] / "last") for name in ("published", "chat"))
    argv = ["--type", "exposure_bias", "--model-path", student, "--teacher-model-path", teacher, "--dev-num", "1"]
    argv += ["--data-dir", str(put(tmp_path / "own")), "--data-names", "own", "--save", str(tmp_path / "out"), *SIZES]
    exposure_bias(evaluate.read_settings([*argv, "--sample-times", "1"]))
    said = capsys.readouterr().err
    assert f"--teacher-model-path {teacher} was trained on prompts of --template chat and not published" in said
    assert said.count("was trained on") == 1


def test_training_warns_of_a_teacher_with_other_prompts(model, trained, tmp_path, capsys):
    argv = ["--method", "kd", "--model-path", str(model), "--teacher-model-path", str(trained["chat"] / "last"), *SIZES]
    argv += ["--data-dir", str(put(tmp_path / "data")), "--save", str(tmp_path / "run"), "--total-iters", "1"]
    train_here([*argv, "--no-eval-gen"])
    assert "train.py: warning: --teacher-model-path" in capsys.readouterr().err


def test_evaluation_follows_the_recorded_rule(model, tmp_path, capsys):
    """Published token files have no special token in front, nor do the prompts of models trained on them."""
    pairs = [{"prompt": f"Word {i}:\n", "output": "data"} for i in range(8)]
    raw = put(tmp_path / "raw", pairs) / "train.jsonl"
    for rule, found in (("own", "own"), ("published", "none")):
        made = ["--raw", str(raw), "--tokenizer", str(model), "--save", str(tmp_path / rule), "--dev-num", "2"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["x", "instructions", *made, "--special-tokens", rule, "--workers", "1"])
            process_data.main()
        argv = ["--method", "sft", "--model-path", str(model), "--data-dir", str(tmp_path / rule), "--no-eval-gen"]
        train_here([*argv, *SIZES, "--save", str(tmp_path / f"run-{rule}"), "--total-iters", "1", "--batch-size", "2"])
        place = tmp_path / f"run-{rule}/last"
        assert read_format(str(place)).special_tokens == found == choose_rule("auto", str(place))
        results = evaluated(place, tmp_path / rule, tmp_path / f"out-{rule}")
        assert results["protocol"]["special_tokens"] == found
        assert "was trained on" not in capsys.readouterr().err
        settings = generate.read_settings(["--model-path", str(model), "--data-dir", str(tmp_path / rule), *SIZES])
        prompts = generate.read_prompts(settings, load_tokenizer(str(model))).ids
        begin = load_tokenizer(str(model)).bos_token_id
        assert all((prompt[0] == begin) == (rule == "own") for prompt in prompts)
    assert "special-tokens none and not own" in mismatch(PromptFormat(), str(place), "--model-path")
    assert choose_rule("published", str(place)) == "published" and choose_rule("auto", str(model)) == "own"


LONG = [{"instruction": "learn data token " * (60 if i % 4 else 1), "output": "beta"} for i in range(16)]
CUT = [{"instruction": "say", "output": "learn data token " * (60 if i % 4 == 0 else 1)} for i in range(8)]


def test_training_reports_dropped_and_shortened_rows(model, tmp_path, capsys):
    data = put(tmp_path / "data", [*LONG, *CUT])
    argv = ["--method", "sft", "--model-path", str(model), "--data-dir", str(data), "--save", str(tmp_path / "run")]
    train_here([*argv, *SIZES, "--total-iters", "1", "--no-eval-gen", "--dev-num", "5"])
    said = capsys.readouterr().err
    assert (
        "train.py: train: of 24 rows 12 dropped (the prompt is over --max-prompt-length), "
        "2 shortened (the response is cut at --max-length)\n" in said
    )
    rows = json.loads((tmp_path / "run/config.json").read_text())["rows"]
    assert rows["train"] == {"read": 24, "dropped": 12, "shortened": 2, "spelled": 0, "altered": 0}
    assert (rows["dev"]["read"], rows["dev"]["dropped"]) == (17, 12) and "train.py: dev: of 17 rows 12" in said


def test_training_is_silent_about_unchanged_rows(trained, model, tmp_path, capsys):
    argv = ["--method", "sft", "--model-path", str(model), "--data-dir", str(put(tmp_path / "data")), *SIZES]
    train_here([*argv, "--save", str(tmp_path / "run"), "--total-iters", "1", "--no-eval-gen"])
    assert not [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py")]


def test_evaluation_and_generation_report_lost_rows(model, tmp_path, capsys):
    data = put(tmp_path / "own", LONG)
    results = evaluated(model, data, tmp_path / "out", "--dev-num", "5")
    assert results["sets"]["own"]["rows_cut"] == 3
    assert "evaluate.py: own: of 5 rows 3 lose part of the prompt" in capsys.readouterr().err
    argv = ["--model-path", str(model), "--data-dir", str(data), "--save", str(tmp_path / "gen"), *SIZES]
    generate.run(generate.read_settings([*argv, "--gen-num", "1"]))
    assert "generate.py: of 16 rows 12 dropped" in capsys.readouterr().err


def test_processing_reports_lost_rows(tmp_path, capsys):
    rows = [*CUT, {"instruction": "say", "output": "the <|endoftext|> data"}]
    raw, tokenizer = put(tmp_path / "raw", rows) / "train.jsonl", str(GOLDEN / "models/gpt2_student")
    argv = ["x", "instructions", "--raw", str(raw), "--tokenizer", tokenizer, "--save", str(tmp_path / "data")]
    sizes = ["--dev-num", "1", "--max-length", "100", "--max-prompt-length", "90", "--workers", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [*argv, *sizes])
        process_data.main()
    valid, train = capsys.readouterr().out.splitlines()
    assert valid.startswith("valid: 1 rows, 0 dropped")
    assert valid.endswith(", 1 shortened (the response is cut at --max-length)")
    spelled = "1 spell a special token, which stays text (see --special-tokens)"
    assert "1 shortened" in train and train.endswith(spelled)
    generated = tmp_path / "generated.jsonl"
    prompt = json.loads((tmp_path / "data/train.jsonl").read_text().splitlines()[0])["prompt"]
    generated.write_text(json.dumps({"prompt": prompt, "gen_answer": "a <|endoftext|>"}) + "\n")
    how = PseudoSettings(str(generated), str(tmp_path / "data"), tokenizer, str(tmp_path / "pseudo"))
    assert pseudo(how)["train"] == f"1 rows, 0 dropped, {spelled}"
