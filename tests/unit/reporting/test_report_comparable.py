"""tools/report.py: which curves may share a table and whose they are, what is left out, costs from sparse logs."""

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
from promptkd.reporting.results import Result, check_comparable, read_result, unlike
from promptkd.training.metrics import MetricsFile, StepTimes
from promptkd.training.trainer import Trainer
from promptkd.utils.progress import Progress

TEACHER = {"path": "teacher", "fingerprint": {"sha256_of_ends": "t"}, "prompt": None}
HOW = {
    "set": "dolly", "sha256": "d", "rows": 2, "seeds": [10], "teacher": TEACHER,
    "protocol": {"published": False, "sample_times": 3, "dev_num": -1},
}  # fmt: skip


def measured(root: Path, name: str, **changes) -> Result:
    """A result whose curve says how it was measured, as evaluate.py's do."""
    folder = make_result(root, name)
    change_json(Path(folder) / "exposure_bias/exposure_bias.json", **{**HOW, **changes})
    return read_result(folder)


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def report(results: list[Result], save: Path, samples: int = 0) -> str:
    write_report(Contents("Some", results, [], None, samples), save)
    return (save / "report.md").read_text()


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"protocol": {**HOW["protocol"], "published": True}}, r"published \(False and True\) on dolly"),
        ({"protocol": {**HOW["protocol"], "sample_times": 1}}, r"sample_times \(3 and 1\)"),
        ({"teacher": {**TEACHER, "fingerprint": {"sha256_of_ends": "u"}}}, "teacher on dolly"),
        ({"teacher": {"path": "other", "fingerprint": None}}, "teacher"),
        ({"sha256": "e"}, "test file on dolly"),
        ({"rows": 1}, r"rows \(2 and 1\)"),
        ({"seeds": [20]}, r"seeds \(\[10\] and \[20\]\)"),
    ],
)
def test_curves_that_were_measured_differently_are_refused_unless_they_may_be_mixed(changes, says, tmp_path):
    """Also where the first result has none."""
    first = read_result(make_result(tmp_path, "teacher"))
    shutil.rmtree(tmp_path / "teacher/exposure_bias")
    results = [first, measured(tmp_path, "sft"), measured(tmp_path, "kd", **changes)]
    with pytest.raises(UserError, match=f"sft and of .*kd was measured with different {says}.*--mixed"):
        check_comparable(results)
    check_comparable(results, mixed=True)
    assert "KD is not comparable to SFT, it was measured with different" in report(results, tmp_path / "out")


def test_curves_that_differ_in_the_prompt_the_path_or_the_set_may_stand_together(tmp_path):
    moved = {**TEACHER, "path": "elsewhere", "prompt": "promptkd/prompt"}
    same = {**HOW["protocol"], "dev_num": 2}
    results = [measured(tmp_path, "sft"), measured(tmp_path, "promptkd", teacher=moved, protocol=same)]
    results += [measured(tmp_path, "kd", set="vicuna", sha256="v"), read_result(make_result(tmp_path, "teacher"))]
    check_comparable(results)
    text = report(results, tmp_path / "out")
    assert "| exposure bias | dolly: excess, % | 95 % | vicuna: excess, % | 95 % | excess, % | 95 % |" in text
    assert "| KD | - | - | 3.0 | -1.0 to 7.0 | - | - |" in text
    assert "| teacher | - | - | - | - | 3.0 | -1.0 to 7.0 |" in text and "not comparable" not in text


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"set": "a/b"}, "no fit name"),
        ({"set": 3}, "not what evaluate.py writes"),
        ({"teacher": {"path": None}}, "not what evaluate.py writes"),
    ],
)
def test_forged_curves_are_named(changes, says, tmp_path):
    with pytest.raises(UserError, match=f"exposure_bias.json: .*{says}"):
        measured(tmp_path, "sft", **changes)


def test_two_files_of_one_set_are_refused(tmp_path):
    folder = measured(tmp_path, "sft").folder / "exposure_bias"
    (folder / "again").mkdir()
    shutil.copy(folder / "exposure_bias.json", folder / "again")
    with pytest.raises(UserError, match="its set 'dolly' has another file"):
        read_result(str(folder.parent))


def test_a_model_from_elsewhere_has_the_curve_beside_its_evaluation_alone(tmp_path):
    """A curve around it may be of another model; that of a run is the run's."""
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


def test_a_new_evaluation_leaves_the_exposure_bias_beside_it(tmp_path):
    kept, lost = tmp_path / "exposure_bias/exposure_bias.json", tmp_path / "dolly/exposure_bias.json"
    for path in (kept, lost):
        path.parent.mkdir()
        path.touch()
    claim(tmp_path, SimpleNamespace(is_main=True, barrier=lambda: None))
    assert kept.exists() and not lost.exists()


def test_all_rows_and_as_many_rows_are_one_protocol(tmp_path):
    """eval_main_uinst.sh says --dev-num 10000, run_eval.sh -1: what they answered is compared."""
    everything = read_result(make_result(tmp_path, "sft", protocol={"top_k": 0, "dev_num": -1}))
    as_many = read_result(make_result(tmp_path, "kd", protocol={"top_k": 0, "dev_num": 10_000}))
    assert unlike(everything, as_many) == []
    rows = as_many.sets["test"]["rougeL_rows"]
    as_many.sets["test"]["rougeL_rows"] = [seed[:-1] for seed in rows]
    assert unlike(everything, as_many) == ["test sets (test: 41 and 40 rows)"]


@pytest.mark.parametrize("damage", [os.unlink, lambda path: write_rows(path, [{"prompt": "Else", "output": "x"}] * 2)])
def test_answers_to_a_test_file_that_is_gone_or_another_are_left_out_with_a_note(damage, tmp_path):
    results = [read_result(make_result(tmp_path, "sft"))]
    assert "gold 1" in report(results, tmp_path / "out", samples=2)
    damage(tmp_path / "valid.jsonl")
    text = report(results, tmp_path / "out", samples=2)
    note = f"test: without answers, since {tmp_path}/valid.jsonl is gone or not what it was at the evaluation."
    assert f"## Answers\n\n{note}\n\n## How" in text and "gold" not in text and "Else" not in text
    assert note in (tmp_path / "out/report.html").read_text()
    assert "Answers" not in report(results, tmp_path / "out", samples=0)


def test_a_report_without_curves_has_no_picture(tmp_path):
    folder = Path(make_result(tmp_path, "sft"))
    (folder / "metrics.jsonl").unlink()
    shutil.rmtree(folder / "exposure_bias")
    write_report(contents([read_result(str(folder))]), tmp_path / "out")
    assert not (tmp_path / "out/curves.png").exists()
    assert "curves.png" not in (tmp_path / "out/report.md").read_text()
    assert "Curves" not in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize("interval", [1, 3, 4, 8])
def test_what_steps_cost_does_not_depend_on_the_log_interval(interval, tmp_path):
    """MiniLLM's rollouts for four steps are made in steps 1, 5, 9 and so on; rows are written elsewhere."""
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
