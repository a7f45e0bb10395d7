"""A study from start to end with scripts that take no time: choices, resuming, failures, the report, the plan."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
from helpers.fake_study import write_project
from helpers.training import ROOT

from promptkd.errors import RunError, UserError
from promptkd.study import process
from promptkd.study.declaration import read_study
from promptkd.study.plan import plan_text
from promptkd.study.report import write_report
from promptkd.study.runner import Runner, read_state
from promptkd.utils.files import lock_folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    path = write_project(tmp_path)
    monkeypatch.setattr(process, "PRELOADED", [])
    monkeypatch.setattr(process, "project_root", lambda: tmp_path)
    return read_study(str(path), tmp_path / "out")


def calls(study) -> list[str]:
    """Return the runs that were trained, in order, without the folder of all runs."""
    text = (study.save.parent / "calls.txt").read_text()
    return [line.removeprefix(f"{study.save}/runs/") for line in text.splitlines()]


def state_of(study):
    return read_state(study, study.save / "stages.json", {})


def test_study_from_start_to_end(project):
    assert "runs that nothing has measured" in plan_text(project, 2)
    Runner(project, 2).run()
    done = calls(project)
    assert len(done) == len(set(done))
    rates = [name for name in done if name.startswith("rates/small/SFT")]
    assert sorted(rates) == [f"rates/small/SFT/lr{rate}" for rate in ("0.001", "0.002", "0.004", "0.008", "0.016")]
    assert "rates/small/PromptKD/lr0.002-temperature=0.5" in done
    grid = state_of(project).grid
    sft = grid.choice("small", project.methods["SFT"])
    assert (sft.rate, sft.score, sft.bracketed, sft.options) == (0.008, 50, True, {})
    frozen = [run for run in grid.runs("ablations") if run.method == "frozen"]
    assert [(run.settings["lr"], run.settings["seed_order"]) for run in frozen] == [(0.002, 1000), (0.002, 3000)]

    write_report(project)
    numbers = json.loads((project.save / "study.json").read_text())
    scores = [r["scores"]["far"]["rougeL"] for r in numbers["runs"] if r["name"].startswith("updates/small/SFT")]
    assert scores == [51, 52]
    assert [run["further"] for run in numbers["runs"] if "updates/small/SFT" in run["name"]] == [
        {"greedy": 51}, {"greedy": 52},
    ]  # fmt: skip
    names = [run["name"] for run in numbers["runs"]]
    assert len(names) == len(set(names)) and "updates/small/PromptKD/seed1" in names
    stages = {stage.name: stage for stage in state_of(project).grid.stages()}
    assert stages["updates/small/SFT/seed1/eval"].after == ("updates/small/SFT/seed1", "prepare/data")
    report = (project.save / "report.md").read_text()
    assert f"| SFT | 2 | **{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f}**" in report
    eces = [score / 10 for score in scores]
    assert f"| SFT | {statistics.mean(eces):.2f} ± {statistics.stdev(eces):.2f} |" in report
    assert "PromptKD/seed1" in " ".join(done) and "ablations/small/PromptKD/seed1" not in done  # that of updates
    assert "ablations/small/PromptKD/seed3" in done and "ablations/small/frozen/seed1" in done
    assert "| PromptKD | 2 |" in report.partition("ablations")[2]
    assert "| few trained parameters in the teacher | | yes | 7 of 700: 1 % |" in report
    assert "less exposure bias throughout training | exposure, small | yes | above it at each: SFT" in report
    difference = numbers["differences"]["ablations/small"]["frozen"]
    assert difference["mean"] == pytest.approx(-3) and difference["p_holm"] < 0.05
    assert {"rates-small.png", "updates-small.png", "exposure-small.png"} <= {p.name for p in project.save.iterdir()}
    plan = plan_text(project, 2)
    counts = dict(re.findall(r"(?m)^(\w+) +(\d+ +\d+) ", plan))
    expected = {"prepare": 1, "rates": 9, "updates": 4, "ablations": 3, "exposure": 2}
    assert {name: text.split() for name, text in counts.items()} == {name: [str(n)] * 2 for name, n in expected.items()}
    assert "\n0.0 CPU hours are left, 0.0 hours" in plan

    before = len(done)
    Runner(project, 2).run()  # nothing is left
    assert len(calls(project)) == before
    shutil.rmtree(project.save / "runs/updates/small/SFT/seed2")
    Runner(project, 2).run()
    assert calls(project)[before:] == ["updates/small/SFT/seed2"]


def test_changed_settings_repeat_only_the_runs_that_have_them(project, tmp_path):
    Runner(project, 2, "updates").run()
    before = len(calls(project))
    text = (tmp_path / "study.yaml").read_text().replace("{method: sft}", "{method: sft, top_k: 5}")
    (tmp_path / "study.yaml").write_text(text)
    Runner(read_study(str(tmp_path / "study.yaml"), project.save), 2, "updates").run()
    repeated = calls(project)[before:]
    assert len(repeated) == 7 and all("/SFT/" in name for name in repeated)


def test_failed_run_is_named_with_its_log_and_repeated(project, tmp_path):
    good = (tmp_path / "train.py").read_text()
    (tmp_path / "train.py").write_text(good + "\nsys.exit(3)")
    with pytest.raises(RunError, match=r"rates/small/.* ended with status 3: see .*\.log"):
        Runner(project, 1).run()
    (tmp_path / "train.py").write_text(good)
    Runner(project, 2, "rates").run()
    assert state_of(project).grid.choice("small", project.methods["SFT"]) is not None


def test_second_runner_is_refused(project):
    lock = lock_folder(project.save)
    with pytest.raises(UserError, match="in use by another run"):
        Runner(project, 1).run()
    lock.release()


@pytest.mark.parametrize(
    "number, kill", [(signal.SIGTERM, os.kill), (signal.SIGTERM, os.killpg), (signal.SIGKILL, os.kill)]
)
def test_killed_study_resumes_without_loss(number, kill, project, tmp_path):
    (tmp_path / "stop").write_text("SFT/lr0.004")
    script = (
        "import sys; from pathlib import Path; from promptkd.study import process; process.PRELOADED = [];"
        f"process.project_root = lambda: Path({str(tmp_path)!r});"
        "from promptkd.study.declaration import read_study; from promptkd.study.runner import Runner;"
        f"Runner(read_study({str(tmp_path / 'study.yaml')!r}, Path({str(project.save)!r})), 1).run()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runner = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    for _ in range(300):
        if (tmp_path / "stopped").exists():
            break
        time.sleep(0.1)
    done = state_of(project).done
    kill(runner.pid, number)
    assert runner.wait(20) in (128 + number, -number)
    assert (tmp_path / "saved").exists() == (number == signal.SIGTERM), "a stopped job has time for a checkpoint"
    (tmp_path / "stop").unlink()
    assert "rates/small/SFT/lr0.002" in done and "rates/small/SFT/lr0.004" not in state_of(project).done
    before = len(calls(project))
    Runner(project, 2, "rates").run()
    assert not done & set(calls(project)[before:])
    assert state_of(project).grid.choice("small", project.methods["SFT"]).rate == 0.008


def budget_runs(grid, study) -> dict[str, tuple[int, int]]:
    """Return the updates and the interval of the evaluations of each method's run with the budget of time."""
    runs = grid.experiment_runs(study.experiments["time"])
    return {run.method: (run.steps, run.settings["eval_interval"]) for run in runs}


def test_time_budget_comes_from_the_chosen_settings(project, tmp_path):
    text = (tmp_path / "study.yaml").read_text().replace("updates: 4\nevaluations: 2", "updates: 30\nevaluations: 3")
    text += "  time: {methods: all, seeds: [1], budget: time}\n"
    (tmp_path / "study.yaml").write_text(text)
    study = read_study(str(tmp_path / "study.yaml"), project.save)
    Runner(study, 2, "rates").run()
    grid = state_of(study).grid
    timed = {run.method: run for run in grid.runs("timing") if run.label == "updates30-2"}
    assert (timed["PromptKD"].settings["lr"], timed["SFT"].settings["lr"]) == (0.002, 0.008)
    names = [run.name for run in grid.runs("timing") if run.stage == "timing"]
    assert len(names) == 12 and budget_runs(grid, study) == {"PromptKD": (30, 10)}

    def seconds(name: str) -> float:  # 3 s to start, 0.1 s for an update of SFT, four times that for PromptKD's
        steps, number = (int(part) for part in name.rpartition("updates")[2].split("-"))
        return 3 + steps * (0.1 if "SFT" in name else 0.4) + (100 if number == 1 else 0)  # one is disturbed

    Runner(study, 2, "timing").run()
    grid = read_state(study, study.save / "stages.json", {name: seconds(name) for name in names}).grid
    assert grid.step_seconds["small", "SFT"] == pytest.approx(0.1)
    assert budget_runs(grid, study) == {"SFT": (120, 40), "PromptKD": (30, 10)}
