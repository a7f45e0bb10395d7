"""Methods x test sets: mean and standard deviation over seeds, the best of each column in bold."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from promptkd.reporting.results import Result

MEASURES = {"rougeL": "ROUGE-L", "exact_match": "exact match"}
METHODS = {"sft": "SFT", "kd": "KD", "seqkd": "SeqKD", "minillm": "MiniLLM", "promptkd": "PromptKD"}


@dataclass(frozen=True)
class Column:
    set: str
    measure: str

    def value(self, result: Result) -> dict:
        """per_seed, mean and std (None for a single seed)."""
        return result.sets[self.set][self.measure]


def label(result: Result) -> str:
    """A folder named as a method has the method's name in tables, any other its own."""
    return METHODS.get(result.name, result.name)


def columns_of(result: Result) -> list[Column]:
    """ROUGE-L of each set; for a single set exact match, too."""
    measures = list(MEASURES) if len(result.sets) == 1 else ["rougeL"]
    return [Column(name, measure) for name in result.sets for measure in measures]


def spread(value: dict) -> str:
    """mean ± standard deviation, two digits."""
    deviation = "" if value["std"] is None else f" ± {value['std']:.2f}"
    return f"{value['mean']:.2f}{deviation}"


def table(compared: list[Result], references: list[Result]) -> str:
    """A Markdown table: the compared models, then the reference lines (never in bold)."""
    columns = columns_of(compared[0])
    best = {column: max(column.value(result)["mean"] for result in compared) for column in columns}
    heads = ["model", *(f"{column.set}: {MEASURES[column.measure]}" for column in columns), "steps", "training"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    for result in [*compared, *references]:
        cells = [label(result) if result in compared else f"*{label(result)}*"]
        for column in columns:
            value = column.value(result)
            bold = "**" if result in compared and value["mean"] == best[column] else ""
            cells.append(f"{bold}{spread(value)}{bold}")
        steps, seconds = result.series("step_seconds")
        cells += [f"{steps[-1]:,}" if steps else "-", f"{sum(seconds):.0f} s"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ranking(compared: list[Result], references: list[Result]) -> str:
    """One sentence for each test set: who is where, and which neighbours are closer than their spread."""
    sentences = []
    for column in (column for column in columns_of(compared[0]) if column.measure == "rougeL"):
        ranked = sorted(compared, key=lambda result: -column.value(result)["mean"])
        shown = ", ".join(f"{label(result)} {column.value(result)['mean']:.2f}" for result in ranked)
        around = ", ".join(f"{label(result)} {column.value(result)['mean']:.2f}" for result in references)
        close = [
            f"{label(one)} and {label(two)}"
            for one, two in pairwise(ranked)
            if column.value(one)["mean"] - column.value(two)["mean"] < _deviation(column, one, two)
        ]
        sentence = f"ROUGE-L on {column.set}: {shown}" + (f" ({around})." if around else ".")
        if close:
            sentence += f" Closer than the spread over seeds: {'; '.join(close)}."
        sentences.append(sentence)
    return "\n".join(sentences)


def _deviation(column: Column, *results: Result) -> float:
    return max(column.value(result)["std"] or 0.0 for result in results)
