"""The table of metrics with their intervals, for results.md and for reports."""

from __future__ import annotations

from typing import Any

from promptkd.utils.tables import Table

METRIC_LABELS = {
    "rougeL": "ROUGE-L",
    "exact_match": "exact match, %",
    "length": "tokens of an answer",
    "cut": "answers cut at the limit, %",
    "repetition": "repeated 4-grams of an answer, %",
    "distinct_1": "distinct words of a prompt's answers, %",
    "distinct_2": "distinct 2-grams of a prompt's answers, %",
    "self_bleu": "self-BLEU",
    "perplexity": "perplexity of references",
    "ece": "calibration error (ECE), %",
    "forward_kl": "KL(teacher || model), nats",
    "reverse_kl": "KL(model || teacher), nats",
}


def metric_table(head: str, columns: dict[str, dict[str, Any]]) -> Table:
    """Build a table with a row for each metric, and a column for each name -> `metrics` of results.json."""
    table = Table([head, *columns])
    for name, label in METRIC_LABELS.items():
        if any(name in metrics for metrics in columns.values()):
            table.add(label, *(_interval(metrics.get(name)) for metrics in columns.values()))
    return table


def _interval(metric: dict[str, float | None] | None) -> str:
    numbers = [] if metric is None else [number for number in metric.values() if number is not None]
    if len(numbers) < 3:
        return "-"
    value, low, high = (f"{number:.{4 if abs(numbers[0]) < 1 else 2}f}" for number in numbers)
    return f"{value} ({low} to {high})"
