#!/usr/bin/env python
"""One report of several models: the table of their evaluations, the curves of their training.

    python tools/report.py --results EVAL_FOLDER... --runs RUN_FOLDER... --save DIR

EVAL_FOLDER holds what evaluate.py wrote, RUN_FOLDER what train.py wrote; a folder's name is its row's name.
Writes DIR/report.md and DIR/report.png and prints the table.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from promptkd.errors import UserError, exit_with
from promptkd.metrics import COLOURS, read_metrics
from promptkd.settings import option, parse

PANELS = [  # title, event, key
    ("dev loss", "eval", "dev_loss"),
    ("dev ROUGE-L", "eval", "rougeL"),
    ("distance of the prompt from its start", "train", "prompt_drift"),
]


@dataclass
class ReportSettings:
    results: list[str] = option(None, "folders that evaluate.py wrote, in the order of the table's rows")
    runs: list[str] | None = option(None, "folders that train.py wrote, for the curves and the cost")
    title: str = option("Report", "heading of the report")
    save: str = option("results/report", "folder for report.md and report.png")

    def __post_init__(self) -> None:
        if not self.results:
            raise UserError("--results is missing: name folders that evaluate.py wrote")


def read_results(folder: Path) -> dict[str, Any]:
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return {"protocol": results["protocol"], "seeds": results["seeds"], "sets": results["sets"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no readable results.json ({error}): evaluate the model anew") from None


def score_table(results: dict[str, dict[str, Any]]) -> str:
    """ROUGE-L, mean ± standard deviation over seeds: models x sets, the best of the last rows not marked."""
    sets = list(dict.fromkeys(name for result in results.values() for name in result["sets"]))
    lines = ["| ROUGE-L | " + " | ".join(sets) + " |", "|---" * (len(sets) + 1) + "|"]
    for name, result in results.items():
        cells = [score_cell(result["sets"].get(one)) for one in sets]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def score_cell(scores: dict[str, Any] | None) -> str:
    if scores is None:
        return "-"
    rouge = scores["rougeL"]
    spread = "" if rouge.get("std") is None else f" ± {rouge['std']:.2f}"
    return f"{rouge['mean']:.2f}{spread}"


def cost_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| run | optimizer steps | seconds per step | peak memory, GB |", "|---|---|---|---|"]
    for name, rows in runs.items():
        steps = [row for row in rows if row["event"] == "train"]
        seconds = sum(row["step_seconds"] for row in steps) / max(len(steps), 1)
        memory = max((row["peak_memory_gb"] for row in steps), default=0.0)
        lines.append(f"| {name} | {steps[-1]['step'] if steps else 0} | {seconds:.3f} | {memory:.2f} |")
    return "\n".join(lines)


def draw(runs: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(4.4 * len(PANELS), 3.5))
    for axis, (title, event, key) in zip(axes, PANELS):
        for (name, rows), colour in zip(runs.items(), COLOURS):
            points = [(row["step"], row[key]) for row in rows if row["event"] == event and key in row]
            if points:
                marker = "o" if event == "eval" else None
                axis.plot(*zip(*points), color=colour, label=name, marker=marker, ms=3.5, lw=1.5)
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def main() -> None:
    settings = parse({"options": ReportSettings}, sys.argv[1:], "report.py", dry_run=False).options
    results = {Path(folder).name: read_results(Path(folder)) for folder in settings.results}
    runs = {}
    for folder in map(Path, settings.runs or []):
        if not (folder / "metrics.jsonl").is_file():
            raise UserError(f"{folder}: it has no metrics.jsonl: name a folder that train.py wrote")
        runs[folder.name] = read_metrics(folder / "metrics.jsonl")
    protocols = {json.dumps(result["protocol"], sort_keys=True) for result in results.values()}
    if len(protocols) > 1:
        raise UserError("--results were made under different protocols (results.json, protocol): evaluate them alike")
    save = Path(settings.save)
    save.mkdir(parents=True, exist_ok=True)
    seeds = len(next(iter(results.values()))["seeds"])
    parts = [f"# {settings.title}", score_table(results), f"Mean ± standard deviation over {seeds} seeds of sampling."]
    if runs:
        draw(runs, save / "report.png")
        parts += ["## Training", "![training curves](report.png)", "## Cost", cost_table(runs)]
    report = "\n\n".join(parts) + "\n"
    (save / "report.md").write_text(report, encoding="utf-8")
    print(f"\n{report}\nwritten to {save}/report.md")


if __name__ == "__main__":
    exit_with(main)
