"""Test which results may share a report, which curves and answers it shows, and costs from sparse logs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.made_results import contents, make_result, write_rows

from promptkd.errors import UserError
from promptkd.evaluation.session import claim
from promptkd.reporting.costs import cost
from promptkd.reporting.report import Contents, write_report
from promptkd.reporting.results import Result, check_comparable, protocol_differences, read_result
from promptkd.training.metrics import MetricsFile, StepTimes
from promptkd.training.trainer import Trainer
from promptkd.utils.progress import Progress

TEACHER = {"path": "teacher", "fingerprint": {"sha256_of_ends": "t"}, "prompt": None}
MEASUREMENT = {
    "set": "dolly", "sha256": "d", "rows": 2, "seeds": [10], "teacher": TEACHER,
    "protocol": {"published": False, "sample_times": 3, "dev_num": -1},
}  # fmt: skip


def measured(root: Path, name: str, **changes) -> Result:
    """Return a result whose curve records its measurement, like those of evaluate.py."""
    folder = make_result(root, name)
    change_json(Path(folder) / "exposure_bias/exposure_bias.json", **{**MEASUREMENT, **changes})
    return read_result(folder)


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def report(results: list[Result], save: Path, samples: int = 0) -> str:
    write_report(Contents("Some", results, [], None, samples), save)
    return (save / "report.md").read_text()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"protocol": {**MEASUREMENT["protocol"], "published": True}}, r"published \(False and True\) on dolly"),
        ({"protocol": {**MEASUREMENT["protocol"], "sample_times": 1}}, r"sample_times \(3 and 1\)"),
        ({"teacher": {**TEACHER, "fingerprint": {"sha256_of_ends": "u"}}}, "teacher on dolly"),
        ({"teacher": {"path": "other", "fingerprint": None}}, "teacher"),
        ({"sha256": "e"}, "test file on dolly"),
        ({"rows": 1}, r"rows \(2 and 1\)"),
        ({"seeds": [20]}, r"seeds \(\[10\] and \[20\]\)"),
    ],
)
def test_check_comparable_refuses_other_measurements_of_exposure_unless_mixed(changes, message, tmp_path):
    """The first result of all need not have exposure bias."""
    first = read_result(make_result(tmp_path, "teacher"))
    shutil.rmtree(tmp_path / "teacher/exposure_bias")
    results = [first, measured(tmp_path, "sft"), measured(tmp_path, "kd", **changes)]
    with pytest.raises(UserError, match=f"sft and of .*kd was measured with different {message}.*--mixed"):
        check_comparable(results)
    check_comparable(results, mixed=True)
    assert "KD is not comparable to SFT, it was measured with different" in report(results, tmp_path / "out")


def test_check_comparable_allows_another_prompt_path_or_set_of_exposure(tmp_path):
    moved = {**TEACHER, "path": "elsewhere", "prompt": "promptkd/prompt"}
    same = {**MEASUREMENT["protocol"], "dev_num": 2}
    results = [measured(tmp_path, "sft"), measured(tmp_path, "promptkd", teacher=moved, protocol=same)]
    results += [measured(tmp_path, "kd", set="vicuna", sha256="v"), read_result(make_result(tmp_path, "teacher"))]
    check_comparable(results)
    text = report(results, tmp_path / "out")
    assert "| exposure bias | dolly: excess, % | 95 % | vicuna: excess, % | 95 % | excess, % | 95 % |" in text
    assert "| KD | - | - | 3.0 | -1.0 to 7.0 | - | - |" in text
    assert "| teacher | - | - | - | - | 3.0 | -1.0 to 7.0 |" in text and "not comparable" not in text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"set": "a/b"}, "invalid name"),
        ({"set": 3}, "not what evaluate.py writes"),
        ({"teacher": {"path": None}}, "not what evaluate.py writes"),
    ],
)
def test_read_result_names_forged_exposure_files(changes, message, tmp_path):
    with pytest.raises(UserError, match=f"exposure_bias.json: .*{message}"):
        measured(tmp_path, "sft", **changes)


def test_read_result_refuses_two_exposure_files_of_one_set(tmp_path):
    folder = measured(tmp_path, "sft").folder / "exposure_bias"
    (folder / "again").mkdir()
    shutil.copy(folder / "exposure_bias.json", folder / "again")
    with pytest.raises(UserError, match="its set 'dolly' has another file"):
        read_result(str(folder.parent))


def test_read_result_without_a_run_takes_exposure_from_its_own_folder_only(tmp_path):
    """Curves around a model without a run may belong to another model."""
    run = measured(tmp_path, "sft").folder
    shutil.copytree(run / "eval", tmp_path / "R")
    assert set(read_result(str(tmp_path / "R")).exposure) == {"dolly"}
    shutil.copytree(run / "exposure_bias", tmp_path / "R/exposure_bias")
    change_json(tmp_path / "R/exposure_bias/exposure_bias.json", set="vicuna")
    assert set(read_result(str(tmp_path / "R")).exposure) == {"vicuna"}
    (run / "metrics.jsonl").unlink()
    assert set(read_result(str(tmp_path / "R")).exposure) == {"vicuna"}
    shutil.rmtree(tmp_path / "R/exposure_bias")
    assert read_result(str(tmp_path / "R")).exposure == {}


def test_claim_keeps_exposure_bias_of_an_evaluation_folder(tmp_path):
    kept, lost = tmp_path / "exposure_bias/exposure_bias.json", tmp_path / "dolly/exposure_bias.json"
    for path in (kept, lost):
        path.parent.mkdir()
        path.touch()
    claim(tmp_path, SimpleNamespace(is_main=True, barrier=lambda: None))
    assert kept.exists() and not lost.exists()


def test_protocol_differences_ignore_dev_num_and_compare_answered_rows(tmp_path):
    """Scripts pass --dev-num 10000 or -1 for the same complete set, so that the answered rows are compared."""
    everything = read_result(make_result(tmp_path, "sft", protocol={"top_k": 0, "dev_num": -1}))
    as_many = read_result(make_result(tmp_path, "kd", protocol={"top_k": 0, "dev_num": 10_000}))
    assert protocol_differences(everything, as_many) == []
    rows = as_many.sets["test"]["rougeL_rows"]
    as_many.sets["test"]["rougeL_rows"] = [seed[:-1] for seed in rows]
    assert protocol_differences(everything, as_many) == ["test sets (test: 41 and 40 rows)"]


@pytest.mark.parametrize("damage", [os.unlink, lambda path: write_rows(path, [{"prompt": "Else", "output": "x"}] * 2)])
def test_report_leaves_out_answers_to_a_changed_test_file_with_a_note(damage, tmp_path):
    results = [read_result(make_result(tmp_path, "sft"))]
    assert "gold 1" in report(results, tmp_path / "out", samples=2)
    damage(tmp_path / "valid.jsonl")
    text = report(results, tmp_path / "out", samples=2)
    note = f"test: without answers, since {tmp_path}/valid.jsonl is missing or changed after the evaluation."
    assert f"## Answers\n\n{note}\n\n## How" in text and "gold" not in text and "Else" not in text
    assert note in (tmp_path / "out/report.html").read_text()
    assert "Answers" not in report(results, tmp_path / "out", samples=0)


def test_report_without_curves_has_no_picture(tmp_path):
    folder = Path(make_result(tmp_path, "sft"))
    (folder / "metrics.jsonl").unlink()
    shutil.rmtree(folder / "exposure_bias")
    write_report(contents([read_result(str(folder))]), tmp_path / "out")
    assert not (tmp_path / "out/curves.png").exists()
    assert "curves.png" not in (tmp_path / "out/report.md").read_text()
    assert "Curves" not in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize("interval", [1, 3, 4, 8])
def test_cost_does_not_depend_on_the_log_interval(interval, tmp_path):
    """MiniLLM generates the rollouts of four steps in steps 1, 5, 9 and so on."""
    folder = Path(make_result(tmp_path, "sft"))
    (folder / "metrics.jsonl").unlink()
    trainer = SimpleNamespace(
        settings=SimpleNamespace(run=SimpleNamespace(log_interval=interval)),
        total=48,
        method=SimpleNamespace(student=SimpleNamespace(lr=0.1, grad_norm=1.0)),
        sampler=SimpleNamespace(epoch_of=lambda step: 1),
        ranks=SimpleNamespace(device=torch.device("cpu")),
        metrics=MetricsFile(folder / "metrics.jsonl", write=True),
        progress=Progress("minillm", 48, show=False),
        times=StepTimes(),
    )
    for step in range(1, 49):
        parts = {"rollout_seconds": 8.0 if step % 4 == 1 else 0.0, "student_seconds": 2.0}
        Trainer.log(trainer, step, {"loss": 1.0}, SimpleNamespace(seconds=parts), sum(parts.values()) + 0.1)
    result = read_result(str(folder))
    assert len(result.metrics) == 48 // interval
    assert cost(result).seconds == pytest.approx(48 * (8 / 4 + 2 + 0.1))
