"""The paper's three claims, judged by the numbers of a study."""

from __future__ import annotations

import numpy as np

from promptkd.reporting.document import Section
from promptkd.study.grid import Grid
from promptkd.study.results import Comparison
from promptkd.utils.strict_json import read_object
from promptkd.utils.tables import Table

LEVEL = 0.05
NOTE = (
    "ROUGE-L: yes if every other method is worse with p below 0.05 after Holm's correction, no if one is better with "
    "such a p, otherwise open. Exposure bias: yes if the reference is below every other method at each measurement by "
    "more than both standard deviations, no if some method is below it so, otherwise open. Methods without all "
    "training seeds leave a claim open."
)


def claims_table(comparisons: list[Comparison], grid: Grid) -> Section:
    """Judge each claim in each experiment that has the numbers."""
    table = Table(["claim", "experiment", "verdict", "numbers"], texts=4)
    for each in comparisons:
        where = f"{each.experiment.name}, {each.pair}"
        if each.differences and not any(grid.study.methods[name].like for name in each.trained):
            table.add("better ROUGE-L than the others", where, *judge_scores(each))
        if not each.experiment.evaluate and each.reference in each.trained:
            table.add("less exposure bias throughout training", where, *judge_exposure(each))
    if share := _share(comparisons, grid):
        table.add("few trained parameters in the teacher", "", "yes", share)
    return Section("The paper's claims", [table, NOTE] if table.rows else [])


def judge_scores(comparison: Comparison) -> tuple[str, str]:
    """Return the verdict on ROUGE-L, and the numbers that it rests on."""
    better = [name for name, (one, p) in comparison.differences.items() if one.mean > 0 and p < LEVEL]
    worse = [name for name, (one, p) in comparison.differences.items() if one.mean < 0 and p < LEVEL]
    missing = comparison.unfinished
    verdict = "no" if better else "yes" if len(worse) == len(comparison.differences) and not missing else "open"
    parts = (("better", better), ("worse", worse), ("unfinished", missing))
    close = [name for name in comparison.differences if name not in better + worse]
    texts = [f"{key}: {', '.join(names)}" for key, names in (*parts, ("not distinguished", close)) if names]
    return verdict, "; ".join(texts)


def judge_exposure(comparison: Comparison) -> tuple[str, str]:
    """Return the verdict on exposure bias during training, and the numbers that it rests on."""
    mean, std = _excess(comparison, comparison.reference)
    lower, higher, missing = [], [], comparison.unfinished
    others = [name for name in comparison.trained if name != comparison.reference]
    for name in others:
        other, spread = _excess(comparison, name)
        difference, margin = (other - mean)[1:], np.maximum(spread, std)[1:]  # all begin from one student
        lower += [name] if (difference < -margin).any() else []
        higher += [name] if (difference > margin).all() else []
    verdict = "no" if lower else "yes" if others and len(higher) == len(others) and not missing else "open"
    parts = (("below it at some measurement", lower), ("above it at each", higher), ("unfinished", missing))
    return verdict, "; ".join(f"{key}: {', '.join(names)}" for key, names in parts if names) or "no clear differences"


def _excess(comparison: Comparison, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation over training seeds of the excess accumulated error at each measurement."""
    values = np.array(comparison.trained[name].curves("ex_acc_err")[1], dtype=float)
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])


def _share(comparisons: list[Comparison], grid: Grid) -> str:
    """Return the share of the soft prompt in the teacher's parameters, of the first run of the reference."""
    for each in comparisons:
        for run in each.trained[each.reference].runs if each.reference in each.trained else ():
            config = read_object(grid.folder(run) / "config.json", "run the study again")
            prompt, teacher = (config.get("parameters", {}).get(key) for key in ("prompt", "teacher"))
            if prompt and teacher:
                return f"{prompt:,} of {teacher:,}: {100 * prompt / teacher:.2g} %"
    return ""
