"""Result folders with invented scores, for the reports."""

from __future__ import annotations

import json
from pathlib import Path

from promptkd.evaluation.tables import over_seeds
from promptkd.reporting.report import Contents, find_baseline
from promptkd.utils.files import digest_of

SCORES = {"sft": [60.0, 62.0], "kd": [61.5, 61.7], "promptkd": [70.0, 71.0], "teacher": [80.0, 82.0]}
HOSTILE = "</td><script>alert(1)</script> a|b & <img src=http://x/y>"


def make_result(root: Path, name: str, sets: tuple[str, ...] = ("test",), **changes) -> str:
    folder = root / name
    for set_name in sets:
        (folder / "eval" / set_name / "seed10").mkdir(parents=True)
        answers = [{"index": i, "answer": f"{HOSTILE} {name} {i}"} for i in range(41)]
        write_rows(folder / "eval" / set_name / "seed10/answers.jsonl", answers)
    file = root / "valid.jsonl"
    write_rows(file, [{"prompt": f"Ask\n{i}", "output": f"gold {i}"} for i in range(2)])
    train = {"event": "train", "step_seconds": 0.5, "loss": 1.0, "peak_memory_gb": 1.5}
    parameters = {"student": 1000, "teacher": 1_558_000_000, "prompt": None}
    if name == "promptkd":
        train |= {"prompt_drift": 0.1, "prompt_kd_loss": 0.3, "prompt_base_loss": 0.2, "student_loss": 0.4}
        parameters["prompt"] = 7 * 1600
    dev = [{"event": "eval", "step": step, "dev_loss": 2.0 - step, "rougeL": 10.0 * step} for step in (0, 2)]
    bias = {"event": "exposure_bias", "step": 2, "ex_acc_err": [1.0, 2.0]}
    write_rows(folder / "metrics.jsonl", [dev[0], *({**train, "step": step} for step in (1, 2)), dev[1], bias])
    config = {
        "settings": {"method": name, "lr": 0.1}, "commit": "abc", "python": "3", "versions": {"torch": "2"},
        "parameters": parameters,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    curves = {
        "ex_acc_err": [None, 3.0],
        "ex_acc_err_low": [None, -1.0],
        "ex_acc_err_high": [None, 7.0],
        **{key: [0.0, 1.0] for key in ("mean_R", "mean_eps", "std_R", "std_eps")},
    }
    (folder / "exposure_bias").mkdir()
    (folder / "exposure_bias/exposure_bias.json").write_text(json.dumps(curves))
    scores = over_seeds(SCORES[name])
    rows = [[score + i for i in range(-20, 21)] for score in SCORES[name]]
    entry = {
        "rows": 41,
        "published_rows": 10_000,
        "rougeL": scores,
        "exact_match": scores,
        "sha256": digest_of(file)["sha256"],
        "file": str(file),
        "rougeL_rows": rows,
    }
    results = {
        "model": {"path": f"{folder}/last"}, "protocol": {"top_k": 0}, "seeds": [10, 20],
        "sets": dict.fromkeys(sets, entry), **changes,
    }  # fmt: skip
    (folder / "eval/results.json").write_text(json.dumps(results))
    return str(folder)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def contents(results: list, baseline: str | None = None) -> Contents:
    return Contents("Some", results, [], find_baseline(baseline, results), 0)
