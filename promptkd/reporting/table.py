"""Build the report's tables: scores, differences to a baseline, exposure bias, settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from promptkd.reporting.bootstrap import Difference, paired_bootstrap
from promptkd.reporting.results import Result
from promptkd.utils.tables import Cell, Table

MEASURES = {"rougeL": "ROUGE-L", "exact_match": "exact match"}
METHOD_LABELS = {"sft": "SFT", "kd": "KD", "seqkd": "SeqKD", "minillm": "MiniLLM", "promptkd": "PromptKD"}
SHOWN_OPTIONS = ("method", "lr", "lr_decay_style", "batch_size", "total_iters", "data_dir", "model_path")


@dataclass(frozen=True)
class Column:
    set: str
    measure: str

    @property
    def head(self) -> str:
        return f"{self.set}: {MEASURES[self.measure]}"

    def value(self, result: Result) -> dict | None:
        """per_seed, mean and std (None for a single seed); None where the result lacks the set."""
        entry = result.sets.get(self.set)
        return None if entry is None else entry[self.measure]


def label(result: Result) -> str:
    """Return a result's name for tables, spelled as in the paper if it is a method's name."""
    return METHOD_LABELS.get(result.name, result.name)


def columns_of(results: list[Result]) -> list[Column]:
    """List the columns: ROUGE-L of each set, and for a single set also exact match."""
    sets = list(dict.fromkeys(name for result in results for name in result.sets))
    return [Column(name, measure) for name in sets for measure in (MEASURES if len(sets) == 1 else ["rougeL"])]


def spread(value: dict | None) -> str:
    """Format mean ± standard deviation with two digits."""
    if value is None:
        return "-"
    deviation = "" if value["std"] is None else f" ± {value['std']:.2f}"
    return f"{value['mean']:.2f}{deviation}"


def scores(compared: list[Result], references: list[Result]) -> Table:
    """Build the table of scores: the compared models, with the best values in bold, then the references."""
    columns = columns_of([*compared, *references])
    table = Table(["model", *(column.head for column in columns)])
    means = {column: [value["mean"] for result in compared if (value := column.value(result))] for column in columns}
    for result in [*compared, *references]:
        listed = result in compared
        row = [Cell(label(result), "" if listed else "em")]
        for column in columns:
            value = column.value(result)
            best = listed and value is not None and value["mean"] == max(means[column]) > min(means[column])
            row.append(Cell(spread(value), "strong" if best else ""))
        table.rows.append(row)
    return table


def differences_to(baseline: Result, results: list[Result]) -> dict[str, dict[str, Difference]]:
    """Compare ROUGE-L with the baseline by paired bootstrap, on sets of which both answered the same examples.

    Returns:
        Name of the result -> name of the set -> difference.
    """
    found: dict[str, dict[str, Difference]] = {}
    for result in results:
        if result is baseline:
            continue
        for name, entry in baseline.sets.items():
            other = result.sets.get(name)
            if other and other["sha256"] == entry["sha256"] and result.rows(name) == baseline.rows(name):
                found.setdefault(result.name, {})[name] = paired_bootstrap(other["rougeL_rows"], entry["rougeL_rows"])
    return found


def differences(baseline: Result, results: list[Result]) -> Table:
    """Build the table of ROUGE-L minus the baseline's on each set: mean, 95 % interval and p-value."""
    sets, found = list(baseline.sets), differences_to(baseline, results)
    table = Table(
        [f"against {label(baseline)}", *(head for name in sets for head in (f"{name}: difference", "95 %", "p"))]
    )
    for result in results:
        if result is baseline:
            continue
        row = [Cell(label(result))]
        for name in sets:
            one = found.get(result.name, {}).get(name)
            texts = (
                ("-", "-", "-")
                if one is None
                else (f"{one.mean:+.2f}", f"{one.low:+.2f} to {one.high:+.2f}", _p(one.p))
            )
            row += [Cell(text) for text in texts]
        table.rows.append(row)
    return table


def exposures(results: list[Result]) -> Table:
    """Build the table of the excess accumulated error at the last response token, with its 95 % interval."""
    sets = list(dict.fromkeys(name for result in results for name in result.exposure))
    heads = (head for name in sets for head in (f"{name}: excess, %".removeprefix(": "), "95 %"))
    table = Table(["exposure bias", *heads])
    for result in results:
        row = [Cell(label(result))]
        for name in sets:
            curves = result.exposure.get(name, {})
            value, low, high = ((curves.get(f"ex_acc_err{side}") or [None])[-1] for side in ("", "_low", "_high"))
            row.append(Cell("-" if value is None else f"{value:.1f}"))
            row.append(Cell("-" if low is None or high is None else f"{low:.1f} to {high:.1f}"))
        if result.exposure:
            table.rows.append(row)
    return table


def settings(results: list[Result]) -> Table:
    """Build the table of the runs' options."""
    table = Table(["run", *SHOWN_OPTIONS, "evaluated"], texts=len(SHOWN_OPTIONS) + 2)
    for result in results:
        options = result.config.get("settings", {})
        cells = [str(_option(options, name)) for name in SHOWN_OPTIONS]
        table.rows.append(
            [Cell(text) for text in (label(result), *cells, Path(result.evaluation["model"]["path"]).name)]
        )
    return table


def _option(options: dict, name: str) -> object:
    """Return an option's value. MiniLLM has --prompt-data-dir in place of --data-dir."""
    return options.get(name) or options.get(f"prompt_{name}") or "-"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
