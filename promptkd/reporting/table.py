"""The report's tables, as Markdown and as HTML: scores, differences to a baseline, exposure bias, settings."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from pathlib import Path

from promptkd.reporting.bootstrap import Difference, paired_bootstrap
from promptkd.reporting.results import Result

MEASURES = {"rougeL": "ROUGE-L", "exact_match": "exact match"}
METHOD_LABELS = {"sft": "SFT", "kd": "KD", "seqkd": "SeqKD", "minillm": "MiniLLM", "promptkd": "PromptKD"}
SHOWN_OPTIONS = ("method", "lr", "lr_decay_style", "batch_size", "total_iters", "data_dir", "model_path")
SPECIAL = r"([\\`*|<\[]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))"  # to Markdown


@dataclass(frozen=True)
class Cell:
    text: str
    style: str = ""  # "strong", "em" or none: the HTML element

    def markdown(self) -> str:
        text = re.sub(SPECIAL, r"\\\1", " ".join(self.text.split()))
        mark = {"strong": "**", "em": "*", "": ""}[self.style]
        return f"{mark}{text}{mark}"

    def html(self) -> str:
        text = html.escape(self.text)
        return f"<{self.style}>{text}</{self.style}>" if self.style else text


@dataclass
class Table:
    """Heads and rows of cells; the first `texts` columns are texts, the others numbers."""

    heads: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    texts: int = 1

    def markdown(self) -> str:
        rules = ["---" if place < self.texts else "--:" for place in range(len(self.heads))]
        lines = [[Cell(head).markdown() for head in self.heads], *([c.markdown() for c in row] for row in self.rows)]
        shown = [f"| {' | '.join(cells)} |" for cells in lines]
        return "\n".join([shown[0], f"|{'|'.join(rules)}|", *shown[1:]])

    def html(self) -> str:
        kinds = ["" if place < self.texts else ' class="number"' for place in range(len(self.heads))]
        heads = "".join(f"<th{kind}>{html.escape(head)}</th>" for head, kind in zip(self.heads, kinds))
        rows = ("".join(f"<td{kind}>{cell.html()}</td>" for cell, kind in zip(row, kinds)) for row in self.rows)
        body = "".join(f"<tr>{row}</tr>\n" for row in rows)
        return f'<div class="wide"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


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
    """A result named as a method has the method's name in tables, any other its own."""
    return METHOD_LABELS.get(result.name, result.name)


def columns_of(results: list[Result]) -> list[Column]:
    """ROUGE-L of each set; for a single set exact match, too."""
    sets = list(dict.fromkeys(name for result in results for name in result.sets))
    return [Column(name, measure) for name in sets for measure in (MEASURES if len(sets) == 1 else ["rougeL"])]


def spread(value: dict | None) -> str:
    """mean ± standard deviation, two digits."""
    if value is None:
        return "-"
    deviation = "" if value["std"] is None else f" ± {value['std']:.2f}"
    return f"{value['mean']:.2f}{deviation}"


def scores(compared: list[Result], references: list[Result]) -> Table:
    """The compared models, the best of each column in bold, then the reference lines (never in bold)."""
    columns = columns_of([*compared, *references])
    made = Table(["model", *(column.head for column in columns)])
    means = {column: [value["mean"] for result in compared if (value := column.value(result))] for column in columns}
    for result in [*compared, *references]:
        listed = result in compared
        row = [Cell(label(result), "" if listed else "em")]
        for column in columns:
            value = column.value(result)
            best = listed and value is not None and value["mean"] == max(means[column]) > min(means[column])
            row.append(Cell(spread(value), "strong" if best else ""))
        made.rows.append(row)
    return made


def differences_to(baseline: Result, results: list[Result]) -> dict[str, dict[str, Difference]]:
    """name -> set -> paired bootstrap of ROUGE-L against the baseline, where both answered the same rows."""
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
    """ROUGE-L minus the baseline's on each set: mean, 95 % interval, p-value."""
    sets, found = list(baseline.sets), differences_to(baseline, results)
    made = Table(
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
        made.rows.append(row)
    return made


def exposures(results: list[Result]) -> Table:
    """Excess accumulated error at the last response token, with its 95 % interval where one was computed."""
    sets = list(dict.fromkeys(name for result in results for name in result.exposure))
    heads = (head for name in sets for head in (f"{name}: excess, %".removeprefix(": "), "95 %"))
    made = Table(["exposure bias", *heads])
    for result in results:
        row = [Cell(label(result))]
        for name in sets:
            curves = result.exposure.get(name, {})
            value, low, high = ((curves.get(f"ex_acc_err{side}") or [None])[-1] for side in ("", "_low", "_high"))
            row.append(Cell("-" if value is None else f"{value:.1f}"))
            row.append(Cell("-" if low is None or high is None else f"{low:.1f} to {high:.1f}"))
        if result.exposure:
            made.rows.append(row)
    return made


def settings(results: list[Result]) -> Table:
    made = Table(["run", *SHOWN_OPTIONS, "evaluated"], texts=len(SHOWN_OPTIONS) + 2)
    for result in results:
        options = result.config.get("settings", {})
        cells = [str(_option(options, name)) for name in SHOWN_OPTIONS]
        made.rows.append(
            [Cell(text) for text in (label(result), *cells, Path(result.evaluation["model"]["path"]).name)]
        )
    return made


def _option(options: dict, name: str) -> object:
    """An option's value; MiniLLM has a folder of prompts in the place of --data-dir."""
    return options.get(name) or options.get(f"prompt_{name}") or "-"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
