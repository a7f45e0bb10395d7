"""Collect the scores of a study's finished runs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from promptkd.reporting.bootstrap import Difference, hierarchical_bootstrap, holm
from promptkd.reporting.results import RESULTS
from promptkd.study.declaration import Experiment, Study
from promptkd.study.grid import Grid
from promptkd.study.run import Run, evaluations_of
from promptkd.utils.jsonl import read_metrics
from promptkd.utils.strict_json import read_object

MEASURES = {"rougeL": "ROUGE-L", "exact_match": "exact match"}
CURVES = ("ex_acc_err", "mean_R", "mean_eps")  # of exposure bias during training


@dataclass(frozen=True)
class Trained:
    """The finished runs of a method in an experiment, one for each training seed.

    Attributes:
        runs: The runs.
        evaluations: Contents of their results.json, none for an experiment without test sets.
        further: Contents of the results.json of further evaluations by name.
        metrics: Lines of their metrics.jsonl.
    """

    method: str
    runs: list[Run]
    evaluations: list[dict[str, Any]]
    further: dict[str, list[dict[str, Any]]]
    metrics: list[list[dict[str, Any]]]

    @property
    def sets(self) -> list[str]:
        return list(self.evaluations[0]["sets"]) if self.evaluations else []

    def means(self, name: str, measure: str) -> list[float]:
        """Return each training seed's mean over sampling seeds, on a test set or on all of them together ("")."""
        sets = [name] if name else self.sets
        return [statistics.fmean(e["sets"][each][measure]["mean"] for each in sets) for e in self.evaluations]

    def measured(self) -> dict[str, list[float]]:
        """Return the values of `--metrics` in results.json for each training seed, as means of the test sets."""
        entries = [[one["metrics"] for one in evaluation["sets"].values()] for evaluation in self.evaluations]
        names = [name for name in entries[0][0] if all(one[name]["value"] is not None for e in entries for one in e)]
        return {name: [statistics.fmean(one[name]["value"] for one in e) for e in entries] for name in names}

    def further_means(self, name: str) -> list[float]:
        """Return each training seed's ROUGE-L of a further evaluation, the mean of its test sets."""
        return [statistics.fmean(one["rougeL"]["mean"] for one in e["sets"].values()) for e in self.further[name]]

    def rows(self, name: str) -> list[list[float]]:
        """Return the ROUGE-L of each example, `[training seed][example]`, as the mean over sampling seeds."""
        sets = [name] if name else self.sets
        lists = [[e["sets"][each]["rougeL_rows"] for each in sets] for e in self.evaluations]
        return [[statistics.fmean(draws) for rows in one for draws in zip(*rows)] for one in lists]

    def curves(self, key: str) -> tuple[list[int], list[list[float]]]:
        """Return the steps of the measurements of exposure bias, and each run's values."""
        measured = [[row for row in rows if row["event"] == "exposure_bias"] for rows in self.metrics]
        steps = [row["step"] for row in measured[0]] if measured else []
        return steps, [[float(row[key]) for row in rows] for rows in measured]


@dataclass(frozen=True)
class Comparison:
    """An experiment's finished runs for one pair of student and teacher."""

    experiment: Experiment
    pair: str
    reference: str
    trained: dict[str, Trained]

    @property
    def sets(self) -> list[str]:
        """Name the test sets, with "" for all together in front."""
        names = next((each.sets for each in self.trained.values() if each.sets), [])
        return ["", *names] if names else []

    @property
    def unfinished(self) -> list[str]:
        """Names of the methods that lack training seeds."""
        seeds = {name: len(each.runs) for name, each in self.trained.items()}
        return [name for name in self.experiment.methods if seeds.get(name, 0) < len(self.experiment.seeds)]

    @cached_property
    def differences(self) -> dict[str, tuple[Difference, float]]:
        """Each method's ROUGE-L on all sets minus the reference's, and the p-value by Holm over the methods."""
        reference = self.trained.get(self.reference)
        if reference is None or not reference.evaluations:
            return {}
        others = {name: each for name, each in self.trained.items() if each is not reference and each.evaluations}
        plain = {name: hierarchical_bootstrap(each.rows(""), reference.rows("")) for name, each in others.items()}
        return dict(zip(plain, zip(plain.values(), holm([each.p for each in plain.values()]))))


def collect(study: Study, grid: Grid) -> list[Comparison]:
    """Return the finished runs of all experiments."""
    found = []
    for experiment in study.experiments.values():
        for pair in experiment.pairs:
            runs = [run for run in grid.experiment_runs(experiment) if run.pair == pair]
            finished = [run for run in runs if _is_finished(grid, run)]
            methods = [name for name in experiment.methods if any(run.method == name for run in finished)]
            trained = {name: _read(grid, name, [r for r in finished if r.method == name]) for name in methods}
            if trained:
                found.append(Comparison(experiment, pair, study.reference, trained))
    return found


def _is_finished(grid: Grid, run: Run) -> bool:
    return {run.name, *(f"{run.name}/{name}" for name in evaluations_of(run, grid.study))} <= grid.done


def _read(grid: Grid, method: str, runs: list[Run]) -> Trained:
    results: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for name in evaluations_of(run, grid.study):
            path = grid.folder(run) / name / RESULTS
            results.setdefault(name, []).append(read_object(path, "run the study again"))
    metrics = [read_metrics(grid.folder(run) / "metrics.jsonl") for run in runs]
    main = results.pop("eval", [])
    return Trained(method, runs, main, {name.removeprefix("eval-"): each for name, each in results.items()}, metrics)
