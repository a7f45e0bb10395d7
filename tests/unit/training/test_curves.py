"""Test which metrics the picture of a run shows, and in which panels."""

from __future__ import annotations

import json

import pytest

from promptkd.training import curves
from promptkd.utils import plotting


@pytest.fixture
def metrics(tmp_path):
    times = {"lr": 1e-4, "step_seconds": 2.0, "rollout_seconds": 1.0, "peak_memory_gb": 1.5}
    terms = {"own_loss": 0.5, "student_loss": 1.0, "prompt_drift": 0.1, "own_share": 0.25}
    sizes = {"response_tokens": 90, "response_length": 22.5, "grad_norm": 1.0}
    rows = [{"event": "train", "step": step, "epoch": 1, **terms, **sizes, **times} for step in range(1, 101)]
    rows += [{"event": "eval", "step": 100, "dev_loss": 2.0, "rougeL": 9.0, "dev_ece": 0.1, "eval_seconds": 1.0}]
    rows += [{"event": "exposure_bias", "step": 100, "ex_acc_err": None, "mean_R": 1.0, "rows": 8, "curve": [1.0]}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_panels_show_each_term_of_the_run(metrics):
    series = curves.read_series(metrics)
    assert series[curves.TOKENS_PER_SECOND][1][0] == 45.0 and len(series["own_loss"][0]) == 100
    assert curves.arrange(series) == {
        "loss per response token": ["student_loss", "own_loss"],
        "dev loss": ["dev_loss"],
        "dev ROUGE-L": ["rougeL"],
        "distance of the prompt from its start": ["prompt_drift"],
        "response tokens per prompt": ["response_length"],
        "response tokens per second": [curves.TOKENS_PER_SECOND],
        "gradient norm": ["grad_norm"],
        "own_share": ["own_share"],
        "dev_ece": ["dev_ece"],
    }


def test_draw_curves_smooths_long_curves(metrics, tmp_path, recwarn):
    curves.draw_curves(metrics, tmp_path / "curves.png", "promptkd: run")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not [each for each in recwarn if issubclass(each.category, UserWarning)]  # Matplotlib's
    losses, *_ = axes = plotting._figure().axes
    assert [each.axison for each in axes] == [True] * 9 + [False] * 3
    assert [len(line.get_xdata()) for line in losses.lines] == [100, curves.SMOOTHED] * 2
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["student_loss", "own_loss"]


def test_draw_curves_of_an_empty_file_is_a_picture(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    curves.draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "sft: run")
    assert (tmp_path / "curves.png").is_file()
