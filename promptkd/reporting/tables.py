"""Build the report's tables: scores, differences to a baseline, exposure bias, settings."""

from __future__ import annotations

from pathlib import Path

from promptkd.reporting.bootstrap import Difference, paired_bootstrap
from promptkd.reporting.results import Result, protocol_differences
from promptkd.utils.format import format_spread
from promptkd.utils.tables import Cell, Table

MEASURES = {"rougeL": "ROUGE-L", "exact_match": "exact match"}
SHOWN_OPTIONS = ("method", "lr", "lr_decay_style", "batch_size", "total_iters", "data_dir", "model_path")


def sets_of(results: list[Result]) -> list[str]:
    """List the test sets of all results, each once."""
    return list(dict.fromkeys(name for result in results for name in result.sets))


def score_table(compared: list[Result], references: list[Result]) -> Table:
    """Build the table of scores: the compared models, with the best values in bold, then the references.

    Its columns are ROUGE-L of each set, and for a single set also exact match.
    """
    sets = sets_of([*compared, *references])
    columns = [(name, measure) for name in sets for measure in (MEASURES if len(sets) == 1 else ["rougeL"])]
    table = Table(["model", *(f"{name}: {MEASURES[measure]}" for name, measure in columns)])
    means = {column: [score["mean"] for result in compared if (score := result.score(*column))] for column in columns}
    for result in [*compared, *references]:
        listed = result in compared
        cells = [Cell(result.label, "" if listed else "em")]
        for column in columns:
            score = result.score(*column)
            best = listed and score is not None and score["mean"] == max(means[column]) > min(means[column])
            text = "-" if score is None else format_spread(score["mean"], score["std"])
            cells.append(Cell(text, "strong" if best else ""))
        table.add(*cells)
    return table


def differences_to(baseline: Result, results: list[Result]) -> dict[str, dict[str, Difference]]:
    """Compare ROUGE-L with the baseline by paired bootstrap, on sets of which both answered the same examples.

    Returns:
        Name of the result -> name of the set -> difference.
    """
    differences: dict[str, dict[str, Difference]] = {}
    for result in results:
        if result is baseline:
            continue
        for name, entry in baseline.sets.items():
            other = result.sets.get(name)
            if other and other["sha256"] == entry["sha256"] and result.examples(name) == baseline.examples(name):
                difference = paired_bootstrap(other["rougeL_rows"], entry["rougeL_rows"])
                differences.setdefault(result.name, {})[name] = difference
    return differences


def difference_table(baseline: Result, results: list[Result], differences: dict[str, dict[str, Difference]]) -> Table:
    """Build the table of ROUGE-L minus the baseline's on each set: mean, 95 % interval and p-value."""
    heads = [head for name in baseline.sets for head in (f"{name}: difference", "95 %", "p")]
    table = Table([f"against {baseline.label}", *heads])
    for result in results:
        if result is baseline:
            continue
        cells = [result.label]
        for name in baseline.sets:
            one = differences.get(result.name, {}).get(name)
            cells += ["-", "-", "-"] if one is None else one.cells()
        table.add(*cells)
    return table


def protocol_table(results: list[Result]) -> Table:
    """Build the table of results that were evaluated differently from the first one."""
    table = Table(["model", f"differs from {results[0].label} in"], texts=2)
    for result in results[1:]:
        if differences := protocol_differences(results[0], result):
            table.add(result.label, "; ".join(differences))
    return table


def exposure_table(results: list[Result]) -> Table:
    """Build the table of the excess accumulated error at the last response token, with its 95 % interval."""
    sets = list(dict.fromkeys(name for result in results for name in result.exposure))
    heads = (head for name in sets for head in (f"{name}: excess, %".removeprefix(": "), "95 %"))
    table = Table(["exposure bias", *heads])
    for result in results:
        cells = [result.label]
        for name in sets:
            curves = result.exposure.get(name, {})
            value, low, high = ((curves.get(f"ex_acc_err{side}") or [None])[-1] for side in ("", "_low", "_high"))
            cells.append("-" if value is None else f"{value:.1f}")
            cells.append("-" if low is None or high is None else f"{low:.1f} to {high:.1f}")
        if result.exposure:
            table.add(*cells)
    return table


def settings_table(results: list[Result]) -> Table:
    """Build the table of the runs' options. MiniLLM has --prompt-data-dir in place of --data-dir."""
    table = Table(["run", *SHOWN_OPTIONS, "evaluated"], texts=len(SHOWN_OPTIONS) + 2)
    for result in results:
        options = result.config.get("settings", {})
        values = [str(options.get(name) or options.get(f"prompt_{name}") or "-") for name in SHOWN_OPTIONS]
        table.add(result.label, *values, Path(result.evaluation["model"]["path"]).name)
    return table
