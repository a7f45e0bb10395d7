"""Metrics beyond ROUGE-L, intervals of all metrics, and their table. Formulas and sources: docs/evaluation.md.

A metric is a function of sums over a test set's examples. Most are a sum divided by a count. The bootstrap therefore
needs no more than each example's own sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from nltk import ngrams
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from promptkd.evaluation.rouge_tokenizers import split_words
from promptkd.utils.tables import Table

if TYPE_CHECKING:
    from promptkd.evaluation.tables import Row

BINS = 15  # of equal width, for the calibration error (Guo et al., 2017)
RESAMPLES = 1000
SEED = 0
_SMOOTH = SmoothingFunction().method1

Columns = dict[str, np.ndarray]  # metric -> the examples' sums, `(examples, 2)`, of ece `(examples, 3 * BINS)`


def distinct(texts: Sequence[list[str]], size: int) -> list[float]:
    """Return [100 x the share of different n-grams among all n-grams of the texts], empty if they have none."""
    grams = [gram for text in texts for gram in ngrams(text, size)]
    return [100.0 * len(set(grams)) / len(grams)] if grams else []


def repetition(texts: Sequence[list[str]]) -> list[float]:
    """Return for each text that has 4-grams 100 x the share of those that repeat earlier ones."""
    return [100.0 - share for text in texts for share in distinct([text], 4)]


def self_bleu(texts: Sequence[list[str]]) -> list[float]:
    """Return for each text that is not empty its BLEU against the others, x 100. A short text has fewer n-grams."""
    scores = []
    for place, text in enumerate(texts):
        if text and len(texts) > 1:
            others = [*texts[:place], *texts[place + 1 :]]
            order = min(4, len(text))
            scores.append(100.0 * sentence_bleu(others, text, [1 / order] * order, _SMOOTH))
    return scores


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return the mean: sum / count."""
    return sums[..., 0] / sums[..., 1]


def calibration_error(sums: np.ndarray) -> np.ndarray:
    """Return the expected calibration error x 100 of the bins' tokens, confidences and hits, `(..., 3 * BINS)`."""
    tokens, confidence, hits = np.split(sums, 3, axis=-1)
    return 100.0 * np.abs(confidence - hits).sum(-1) / tokens.sum(-1)


@dataclass(frozen=True)
class Metric:
    """What is measured of the answers to one prompt, and what follows from the sums over prompts.

    Attributes:
        label: The name in tables.
        of_answers: Function of the answers, their words and the limit of tokens, for metrics of answers.
        statistic: Function of the sums, `(..., 2)` or for ece `(..., 3 * BINS)`.
    """

    label: str
    of_answers: Callable[[Sequence[Row], list[list[str]], int], list[float]] = lambda *_: []
    statistic: Callable[[np.ndarray], np.ndarray] = ratio


METRICS = {
    "rougeL": Metric("ROUGE-L", lambda rows, *_: [row.rouge_l for row in rows]),
    "exact_match": Metric("exact match, %", lambda rows, *_: [row.exact_match for row in rows]),
    "length": Metric("tokens of an answer", lambda rows, *_: [row.length for row in rows]),
    "cut": Metric("answers cut at the limit, %", lambda rows, _, most: [100.0 * (row.length >= most) for row in rows]),
    "repetition": Metric("repeated 4-grams of an answer, %", lambda rows, texts, _: repetition(texts)),
    "distinct_1": Metric("distinct words of a prompt's answers, %", lambda rows, texts, _: distinct(texts, 1)),
    "distinct_2": Metric("distinct 2-grams of a prompt's answers, %", lambda rows, texts, _: distinct(texts, 2)),
    "self_bleu": Metric("self-BLEU", lambda rows, texts, _: self_bleu(texts)),
    "perplexity": Metric("perplexity of references", statistic=lambda sums: np.exp(ratio(sums))),
    "ece": Metric("calibration error (ECE), %", statistic=calibration_error),
    "forward_kl": Metric("KL(teacher || model), nats"),
    "reverse_kl": Metric("KL(model || teacher), nats"),
}


def answer_columns(answers: list[list[Row]], names: Sequence[str], limit: int) -> Columns:
    """Return sum and count of each metric over the answers to each prompt.

    Args:
        answers: The answers of each seed in the order of the set.
        names: Metrics as `--metrics` names them.
        limit: Maximum number of tokens in an answer.
    """
    sums = np.array([answer_sums(rows, names, limit) for rows in zip(*answers)], dtype=np.float64)
    return {name: sums[:, place] for place, name in enumerate(expand(names))}


def answer_sums(rows: Sequence[Row], names: Sequence[str], limit: int) -> list[tuple[float, int]]:
    """Return sum and count of each metric over the answers to one prompt, one from each seed."""
    texts = [split_words(row.answer) for row in rows]
    measured = [METRICS[name].of_answers(rows, texts, limit) for name in expand(names)]
    return [(sum(each), len(each)) for each in measured]


def expand(names: Sequence[str]) -> list[str]:
    """Return the names in results.json of metrics as `--metrics` names them."""
    parts = {"distinct": ["distinct_1", "distinct_2"], "kl": ["forward_kl", "reverse_kl"]}
    return [part for name in dict.fromkeys(names) for part in parts.get(name, [name])]


def with_intervals(columns: Columns) -> dict[str, dict[str, float | None]]:
    """Return each metric's value and its 95 % interval, which resamples examples. None stands for an undefined value.

    All metrics see the same resamples, and the same input gives the same numbers.
    """
    examples = len(next(iter(columns.values())))
    generator = np.random.Generator(np.random.Philox(SEED))
    weights = generator.multinomial(examples, [1 / examples] * examples, size=RESAMPLES).astype(np.float64)
    results: dict[str, dict[str, float | None]] = {}
    for name, sums in columns.items():
        statistic = METRICS[name].statistic
        with np.errstate(divide="ignore", invalid="ignore"):
            value, resampled = statistic(sums.sum(0)), statistic(weights @ sums)
        results[name] = {"value": None, "low": None, "high": None}
        if np.isfinite(value):
            low, high = np.percentile(resampled[np.isfinite(resampled)], [2.5, 97.5])
            results[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return results


def metric_table(head: str, columns: dict[str, dict[str, Any]]) -> Table:
    """Build a table with a row for each metric, and a column for each name -> `metrics` of results.json."""
    table = Table([head, *columns])
    for name, metric in METRICS.items():
        if any(name in metrics for metrics in columns.values()):
            table.add(metric.label, *(_interval(metrics.get(name)) for metrics in columns.values()))
    return table


def _interval(metric: dict[str, float | None] | None) -> str:
    numbers = [] if metric is None else [number for number in metric.values() if number is not None]
    if len(numbers) < 3:
        return "-"
    value, low, high = (f"{number:.{4 if 0 < abs(numbers[0]) < 1 else 2}f}" for number in numbers)
    return f"{value} ({low} to {high})"
