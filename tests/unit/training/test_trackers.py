"""Experiment trackers: their own readers show the numbers of metrics.jsonl, also after a run was killed and resumed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import crash_at
from helpers.training import golden_argv, metrics_of, start, train_here

from promptkd.errors import UserError
from promptkd.training import trackers
from promptkd.training.metrics import MetricsFile
from promptkd.training.run_folder import clear_folder
from promptkd.training.trackers import Tracker, Trackers

SETTINGS = {"method": "sft", "lr": 0.1, "report_to": ["tensorboard"], "top_k": None}
Series = dict[str, dict[int, float]]  # scalar -> step -> value


def series_of(rows: list[dict[str, Any]]) -> Series:
    """Return the numbers of metrics.jsonl by the names that trackers use."""
    series: Series = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != "step":
                series.setdefault(f"{row['event']}/{key}", {})[row["step"]] = value
    return series


def log_rows(folder: Path, name: str, steps: range, resumed: dict[str, Any] | None = None) -> Trackers:
    """Report rows of these steps to one tracker, as a run does."""
    folder.mkdir(exist_ok=True)
    reporting = Trackers(resumed)
    reporting.start([name], folder, SETTINGS)
    metrics = MetricsFile(folder / "metrics.jsonl", True, reporting)
    for step in steps:
        metrics.row("train", step, loss=1 / step, grad_norm=step * 0.5, parts=["text"])
        if step % 3 == 0:
            metrics.row("eval", step, dev_loss=2.0 + step, rougeL=10.0, curve=[1.0, 2.0])
    return reporting


def log_killed_and_resumed_run(folder: Path, name: str) -> tuple[str, Series]:
    """Report a run that ends after step 4 without its checkpoint, and resumes after step 2. Return id and numbers."""
    first = log_rows(folder, name, range(1, 5))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    first.close()
    (folder / "metrics.jsonl").write_text("".join(lines[:2]))
    second = log_rows(folder, name, range(3, 7), {"step": 2, "run_id": first.run_id})
    assert second.run_id == first.run_id
    second.close(folder / "metrics.jsonl")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return first.run_id, series_of(rows)


def test_tensorboard_shows_the_numbers_of_a_resumed_run(save):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = golden_argv("sft", save, "--total-iters", "3", "--batch-size", "2", "--dev-num", "1", "--no-eval-gen")
    argv += ["--checkpoint-every", "1", "--report-to", "tensorboard"]
    crash_at(3, argv)
    train_here([*argv, "--resume"])
    events = EventAccumulator(str(save / "tensorboard"))
    events.Reload()
    shown = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    expected = series_of([*metrics_of(save), *metrics_of(save, "eval")])
    assert shown.keys() == expected.keys()
    for name, values in expected.items():
        assert [len(events.Scalars(name)), shown[name]] == [len(values), pytest.approx(values, rel=1e-6)], name
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "| batch_size | 2 |" in texts["settings/text_summary"]
    assert f"{metrics_of(save, 'eval')[-1]['dev_loss']:.4f}" in texts["evaluations/text_summary"]
    clear_folder(save)  # as --overwrite does
    assert not (save / "tensorboard").exists()


def test_trackio_shows_the_numbers_of_a_resumed_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    run_id, expected = log_killed_and_resumed_run(tmp_path / "run", "trackio")
    runs = [run for run in trackio.Api().runs("promptkd") if run.name == f"run-{run_id}"]
    assert len(runs) == 1 and runs[0].config["lr"] == 0.1
    logs = SQLiteStorage.get_logs("promptkd", runs[0].name)
    for name, values in expected.items():
        assert {row["step"]: row[name] for row in logs if name in row} == values
    assert [row["dev_loss"] for row in logs[-1]["evaluations"]["_value"]] == ["5.0000", "8.0000"]


def test_wandb_offline_holds_the_numbers_of_a_resumed_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_id, expected = log_killed_and_resumed_run(tmp_path / "run", "wandb")
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and all(file.name == f"run-{run_id}.wandb" for file in files)
    shown: Series = {}
    end = time.monotonic() + 20
    while "evaluations/nrows" not in shown and time.monotonic() < end:  # W&B's own process writes the files
        rows = [row for file in files for row in wandb_history(file)]
        shown = {name: {row["_step"]: row[name] for row in rows if name in row} for row in rows for name in row}
    assert {name: shown[name] for name in expected} == expected
    assert shown["evaluations/nrows"] == {6: 2}


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """Read the history rows of an offline run: records in a LevelDB log, of blocks of 32 KiB after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, rows, record = file.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a complete record, or the last part of one
            parsed, record = Record.FromString(record), b""
            items = parsed.history.item
            if items:
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                rows.append(row)
    return rows


def test_mlflow_shows_the_numbers_of_a_resumed_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run_id, expected = log_killed_and_resumed_run(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("promptkd").experiment_id])
    assert len(runs) == 1 and runs[0].data.tags["promptkd_run"] == run_id and runs[0].data.params["lr"] == "0.1"
    for name, values in expected.items():
        assert {each.step: each.value for each in client.get_metric_history(runs[0].info.run_id, name)} == values


class Recorder:
    """A tracker that fails from a step on."""

    def __init__(self, fails_at: int) -> None:
        self.fails_at, self.steps, self.closed = fails_at, [], []

    def log(self, values: dict[str, float], step: int) -> None:
        self.steps.append(step)
        if step >= self.fails_at:
            raise ConnectionError("the server\nis gone")

    def start(self, run: Trackers) -> Tracker:
        return Tracker(self.log, self.closed.append)


def test_failing_tracker_is_dropped_and_the_run_continues(tmp_path, monkeypatch, capsys):
    failing, healthy = Recorder(3), Recorder(99)
    monkeypatch.setattr(trackers, "STARTERS", {"wandb": failing.start, "trackio": healthy.start})
    reporting = Trackers()
    reporting.start(["wandb", "trackio"], tmp_path, SETTINGS)
    metrics = MetricsFile(tmp_path / "metrics.jsonl", True, reporting)
    for step in range(1, 6):
        metrics.row("train", step, loss=1.0)
    metrics.row("eval", 5, dev_loss=2.0)
    reporting.close(tmp_path / "metrics.jsonl")
    reporting.close()
    assert failing.steps == [1, 2, 3] and not failing.closed
    assert healthy.steps == [1, 2, 3, 4, 5, 5] and [table.text() for table in healthy.closed] == [
        "step  dev_loss\n5       2.0000"
    ]
    assert len(metrics_of(tmp_path)) == 5
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and "wandb failed (ConnectionError: the server is gone)" in warnings[0]


def test_tracker_that_does_not_start_stops_the_run_before_it_writes(save, monkeypatch):
    def refuse(run: Trackers) -> Tracker:
        raise ValueError("no API key")

    started = Recorder(99)
    monkeypatch.setattr(trackers, "STARTERS", {"trackio": started.start, "wandb": refuse})
    monkeypatch.setattr(trackers, "check_packages", lambda names: None)
    monkeypatch.setattr("promptkd.training.setup.check_packages", lambda names: None)
    with pytest.raises(UserError, match=r"--report-to wandb does not start .*no API key"):
        train_here(golden_argv("sft", save, "--report-to", "trackio", "wandb"))
    assert started.closed == [None] and not save.exists()


def test_tracker_that_does_not_start_stops_all_ranks(save):
    pytest.importorskip("mlflow")
    done = start(golden_argv("sft", save, "--report-to", "mlflow"), ranks=2, MLFLOW_TRACKING_URI="nowhere://at.all")
    lines = [line for line in done.stderr.splitlines() if "--report-to mlflow does not start" in line]
    assert done.returncode == 2 and len(lines) == 2 and "Traceback" not in done.stderr
    assert not save.exists()


def test_tensorboard_writes_nothing_if_another_tracker_does_not_start(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(trackers, "STARTERS", {"tensorboard": trackers.tensorboard})
    with pytest.raises(UserError, match="--report-to wandb does not start"):
        Trackers().start(["tensorboard", "wandb"], tmp_path, SETTINGS)
    assert not list(tmp_path.iterdir())


def test_folder_of_a_trackers_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "an_absent_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="needs the package an_absent_tracker"):
        trackers.check_packages(["an_absent_tracker"])
    trackers.check_packages(["json"])


def test_missing_package_stops_the_run_before_it_writes(save, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--report-to wandb needs the package wandb: bash install.sh --extras wandb"):
        trackers.check_packages(["wandb"])
    with pytest.raises(UserError, match="choose from"):
        train_here(golden_argv("sft", save, "--report-to", "comet"))
    assert not save.exists()
