"""Pushing what a run saved to a hub on this machine (tests/helpers/fake_hub.py), and the card that goes with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import fake_hub
from helpers.fake_hub_uploads import TOKEN
from helpers.made_results import make_result
from helpers.training import GOLDEN, golden_argv
from huggingface_hub import ModelCard, constants

from promptkd import cli
from promptkd.cli import train
from promptkd.errors import UserError
from promptkd.reporting.model_card import find_trained, model_card
from promptkd.reporting.results import read_result
from promptkd.reporting.upload import files_of

WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with fake_hub.serving(monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed_run(tmp_path_factory) -> tuple[Path, fake_hub.FakeHub]:
    """A PromptKD run of two steps that pushed its best model to me/student, and the hub after it."""
    save = tmp_path_factory.mktemp("push") / "run"
    argv = golden_argv("promptkd", save, "--total-iters", "2", "--batch-size", "4", "--dev-num", "2")
    with pytest.MonkeyPatch.context() as monkeypatch, fake_hub.serving(monkeypatch) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(sys, "argv", ["train.py", *argv, "--push-to-hub", "me/student"])
        train.main()
    return save, hub


@pytest.fixture
def run(pushed_run) -> Path:
    return pushed_run[0]


def push(monkeypatch, path: Path, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["promptkd", "push", str(path), *options])
    cli.dispatch()


def test_train_pushes_best_model_with_card_to_private_repository(pushed_run):
    run, hub = pushed_run
    pushed = hub.repos["models/me/student"]
    local = {path.name: path.read_bytes() for path in (run / "best_rougeL").iterdir()}
    assert pushed == {**local, "README.md": pushed["README.md"], "curves.png": (run / "curves.png").read_bytes()}
    assert hub.uploads.private == {"me/student": True} and len(hub.uploads.commits) == 1
    assert {request.authorization for request in hub.log if request.method == "POST"} == {f"Bearer {TOKEN}"}

    card = ModelCard(pushed["README.md"].decode())
    assert card.data.library_name == "transformers" and "promptkd" in card.data.tags and card.data.base_model is None
    for text in (
        "PromptKD",
        'from_pretrained("me/student")',
        "prompt_kd_loss",
        "dev_loss",
        "curves.png",
        "gpt2_teacher",
    ):
        assert text in card.text
    assert str(GOLDEN.parent) not in card.content and str(run.parent) not in card.content


def test_push_soft_prompt_to_public_repository(run, hub, monkeypatch):
    push(monkeypatch, run / "prompt", "--to", "me/prompt", "--public")
    assert hub.uploads.private == {"me/prompt": False}
    pushed = hub.repos["models/me/prompt"]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= pushed.keys()
    card = ModelCard(pushed["README.md"].decode())
    assert card.data.library_name == "peft" and 'PeftModel.from_pretrained(model, "me/prompt")' in card.text
    assert 'AutoModelForCausalLM.from_pretrained("./gpt2_teacher")' in card.text
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "./gpt2_teacher"
    assert '# "./gpt2_teacher" is a folder' in card.text


def test_model_card_has_test_scores_of_this_model_and_licenses(tmp_path):
    run, base = Path(make_result(tmp_path, "promptkd")), tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nA base model.\n")
    config = json.loads((run / "config.json").read_text())
    config["settings"] |= {
        "model_path": str(base),
        "teacher_model_path": "owner/teacher",
        "data_dir": "hub:owner/data@1",
    }
    (run / "config.json").write_text(json.dumps(config))
    for name in ("last", "best_loss", "prompt"):
        (run / name).mkdir()
        (run / name / WEIGHTS).write_bytes(b"")
    (run / "prompt/adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    card = ModelCard(model_card(find_trained(run / "last"), "me/student"))
    assert card.data.license == "apache-2.0" and card.data.datasets == "owner/data"
    score = read_result(str(run)).score("test")
    assert "## Test sets" in card.text and f"{score['mean']:.2f} ± {score['std']:.2f}" in card.text
    card = ModelCard(model_card(find_trained(run), "me/student"))  # best_loss was not evaluated
    assert "## Test sets" not in card.text
    assert ModelCard(model_card(find_trained(run / "prompt"), "me/prompt")).data.base_model == "owner/teacher"


def test_push_of_continued_adapter_names_its_base_instead_of_the_adapter(tmp_path):
    run = Path(make_result(tmp_path, "kd"))
    config = json.loads((run / "config.json").read_text())
    config["settings"] |= {"model_path": "results/lora/last", "teacher_model_path": "owner/teacher"}
    (run / "config.json").write_text(json.dumps(config))
    (run / "last").mkdir()
    (run / "last" / WEIGHTS).write_bytes(b"")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
    (run / "last/adapter_config.json").write_text(json.dumps(adapter))
    trained = find_trained(run / "last")
    assert json.loads(files_of(trained, "me/lora")["adapter_config.json"]) == adapter
    card = ModelCard(model_card(trained, "me/lora"))
    assert card.data.base_model == "owner/base" and "is a folder of" not in card.text


def test_push_repeats_after_interruptions_without_uploading_twice(run, hub, monkeypatch):
    hub.uploads.refuse = {"PUT": [403], "commit": [500]}
    for status in (403, 500):  # the upload of the weights fails, then the commit
        with pytest.raises(UserError, match=str(status)):
            push(monkeypatch, run, "--to", "me/student")
        assert hub.repos["models/me/student"] == {}
    push(monkeypatch, run, "--to", "me/student")
    push(monkeypatch, run, "--to", "me/student")
    assert len([request for request in hub.log if request.method == "PUT"]) == 2
    assert len(hub.uploads.commits) == 1 and WEIGHTS in hub.repos["models/me/student"]


def test_push_leaves_out_what_is_no_part_of_a_model(run, hub, monkeypatch, tmp_path):
    folder = tmp_path / "run" / "last"
    folder.mkdir(parents=True)
    for name in ("metrics.jsonl", "config.json"):
        (folder.parent / name).write_bytes((run / name).read_bytes())
    (tmp_path / "secret.json").write_text("{}")
    (folder / WEIGHTS).write_bytes(b"weights")
    (folder / "notes.py").write_text("private")
    (folder / ".env").write_text("private")
    (folder / "link.json").symlink_to(tmp_path / "secret.json")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMy own card.\n")
    push(monkeypatch, folder, "--to", "me/own")
    assert hub.repos["models/me/own"].keys() == {WEIGHTS, "README.md"}
    assert b"My own card" in hub.repos["models/me/own"]["README.md"]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda m: m.delenv("HF_TOKEN"), ["--to", "me/a"], "HF_TOKEN"),
        (lambda m: m.setenv("HF_TOKEN", "hf_other"), ["--to", "me/a"], "check HF_TOKEN"),
        (lambda m: m.setattr(constants, "HF_HUB_OFFLINE", True), ["--to", "me/a"], "HF_HUB_OFFLINE"),
        (lambda m: m.setattr(constants, "ENDPOINT", "http://127.0.0.1:9"), ["--to", "me/a"], "run promptkd push"),
        (lambda m: None, ["--to", "me/a/b"], "repository's name"),
        (lambda m: None, [], "--to"),
    ],
)
def test_push_errors_are_one_line(run, hub, monkeypatch, change, arguments, message):
    change(monkeypatch)
    with pytest.raises(UserError, match=message):
        push(monkeypatch, run, *arguments)
    assert not hub.uploads.commits


def test_push_refuses_folders_without_a_run(hub, monkeypatch, tmp_path):
    for path in (tmp_path, tmp_path / "missing", GOLDEN / "models/gpt2_student"):
        with pytest.raises(UserError, match="no model of a run"):
            push(monkeypatch, path, "--to", "me/a")
    assert not hub.log


def test_push_to_hub_without_token_stops_before_training(monkeypatch, save):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sys, "argv", ["train.py", *golden_argv("sft", save, "--push-to-hub", "me/student")])
    with pytest.raises(UserError, match="HF_TOKEN"):
        train.main()
    assert not save.exists()


def test_name_that_is_no_repository_is_refused_by_a_dry_run(monkeypatch, save):
    argv = golden_argv("sft", save, "--push-to-hub", "a b/c", "--dry-run")
    with pytest.raises(UserError, match="--push-to-hub 'a b/c' is not a repository's name"):
        train.resolve(argv)
