"""The pictures of a study: dev scores against rates, differences between methods, exposure bias during training."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np

from promptkd.study.grid import Grid
from promptkd.study.results import Comparison
from promptkd.utils.plotting import COLORS, GRAY, MARKERS, label_axes, new_figure, shown


def draw_rates(grid: Grid, pair: str, picture: Path) -> bool:
    """Draw the dev ROUGE-L of each method against the learning rate. Return whether there is anything to draw."""
    curves = {name: grid.rate_scores(pair, name) for name, each in grid.study.methods.items() if not each.like}
    curves = {name: scores for name, scores in curves.items() if scores}
    if not curves:
        return False
    with new_figure((7, 4.2)) as (figure, axes):
        panel = axes[0, 0]
        for place, (name, scores) in enumerate(curves.items()):
            rates = sorted(scores)
            style = "-" if place < len(COLORS) else "--"
            color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
            values = [scores[rate] for rate in rates]
            panel.plot(rates, values, style, color=color, marker=marker, label=shown(name))
        panel.set_xscale("log", base=2)
        rates = sorted({rate for scores in curves.values() for rate in scores})
        panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
        panel.set(title=f"{pair}: dev ROUGE-L, one training seed", xlabel="learning rate")
        figure.legend(loc="outside right center")
        figure.savefig(picture)
    return True


def draw_differences(comparison: Comparison, picture: Path) -> bool:
    """Draw ROUGE-L of all test sets: a point for each training seed and the mean of each method."""
    trained = {name: each.means("", "rougeL") for name, each in comparison.trained.items() if each.evaluations}
    if not trained:
        return False
    with new_figure((6.5, 0.6 + 0.3 * len(trained))) as (figure, axes):
        panel, names = axes[0, 0], list(reversed(trained))
        for place, name in enumerate(names):
            values = trained[name]
            color = COLORS[0] if name == comparison.reference else GRAY
            panel.plot(values, [place] * len(values), "o", color=color, alpha=0.5)
            panel.plot([statistics.fmean(values)], [place], "|", color=color, markersize=16)
        panel.set_yticks(range(len(names)), [shown(name) for name in names])
        panel.set(title=f"{comparison.experiment.name}, {comparison.pair}: ROUGE-L, mean of the test sets")
        figure.savefig(picture)
    return True


def draw_exposure(comparison: Comparison, picture: Path) -> bool:
    """Draw the excess accumulated error during training, with bands of a standard deviation over training seeds."""
    with new_figure((10, 4.2), columns=2) as (figure, axes):
        for panel, key, title in zip(axes[0], ("ex_acc_err", "mean_R"), ("excess accumulated error, %", "R")):
            for place, (name, each) in enumerate(comparison.trained.items()):
                steps, runs = each.curves(key)
                if not steps:
                    continue
                values = np.array(runs, dtype=float)
                mean, std = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(steps))
                color, style = COLORS[place % len(COLORS)], "-" if place < len(COLORS) else "--"
                panel.plot(steps, mean, style, color=color, label=shown(name) if key == "ex_acc_err" else None)
                panel.fill_between(steps, mean - std, mean + std, color=color, alpha=0.12, lw=0)
            label_axes(panel, f"{comparison.pair}: {title}", "optimizer step")
        if axes[0][0].get_legend() is not None:
            axes[0][0].get_legend().remove()
        figure.legend(loc="outside right center")
        figure.savefig(picture)
    return True
