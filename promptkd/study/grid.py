"""From a declared study and its results so far to the runs that can be made now."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from promptkd.config.option_file import as_arguments
from promptkd.reproduction.stages import Stage
from promptkd.study.declaration import Experiment, Options, Study, StudyMethod
from promptkd.study.run import Choice, Run, evaluations_of
from promptkd.utils.jsonl import read_metrics

MOST_EXTENSIONS = 5  # of the rates at one end
TIMINGS = 3  # measurements of each method's seconds, of which the median counts
STUDENT = "best_rougeL"  # the model of a run that is compared: the best of its evaluations on the dev set


class Grid:
    """The runs of a study.

    Args:
        study: The declaration.
        seconds: Name of a finished stage -> seconds of CPU time.
        done: Names of the finished stages.
    """

    def __init__(self, study: Study, seconds: dict[str, float], done: set[str]) -> None:
        self.study, self.seconds, self.done = study, seconds, done
        self._known: dict[tuple[str, str], tuple[Choice | None, list[Run]]] = {}  # results of `_tune`

    def folder(self, run: Run) -> Path:
        return self.study.save / "runs" / run.name

    def stages(self, only: str | None = None) -> Iterator[Stage]:
        """Yield the stages that can be run, in order. Later ones depend on the results of these.

        A step of the preparation comes in front of the first run that needs it: whose options name its folder.
        """
        steps = {stage.name: stage for stage in self._prepare()}
        seen = set[str]()
        for run in self.runs(only):
            for stage in self._stages_of(run, tuple(steps)):
                for each in (*self._with_earlier(tuple(name for name in stage.after if name in steps), steps), stage):
                    if each.name not in seen:
                        yield each
                    seen.add(each.name)
        if only == "prepare":
            yield from steps.values()

    def _needed(self, options: Options, steps: tuple[str, ...]) -> tuple[str, ...]:
        """Return the steps of the preparation whose folders the options name."""
        paths = [Path(value) for value in options.values() if isinstance(value, str)]
        folders = {name: self.study.save / name.removeprefix("prepare/") for name in steps}
        return tuple(name for name, folder in folders.items() if any(path.is_relative_to(folder) for path in paths))

    def _with_earlier(self, names: tuple[str, ...], steps: dict[str, Stage]) -> Iterator[Stage]:
        """Yield steps of the preparation, each behind those that it reads."""
        for name in names:
            yield from self._with_earlier(steps[name].after, steps)
            yield steps[name]

    def runs(self, only: str | None = None) -> Iterator[Run]:
        """Yield the runs whose settings are known, for each experiment the choice of rates first.

        Args:
            only: "timing", "rates" or an experiment, None for all, or "prepare" for none.
        """
        seen = set[tuple[str, str, str]]()
        for experiment in self.study.experiments.values():
            if only in self.study.experiments and only != experiment.name:
                continue
            for pair, method in self._tuned(experiment):
                runs = self.tuning_runs(pair, method)
                runs += self._timing_runs(pair, method) if experiment.budget == "time" else []
                timed = only == "timing" and experiment.budget == "time"  # which needs the chosen rates
                for run in runs:
                    key = (run.stage, run.pair, run.method + run.label)
                    if key not in seen and (timed or only in (None, experiment.name, run.stage)):
                        seen.add(key)
                        yield run
            if only in (None, experiment.name):
                yield from self.experiment_runs(experiment)

    def _tuned(self, experiment: Experiment) -> list[tuple[str, StudyMethod]]:
        """Return the pairs and methods whose rate an experiment needs."""
        methods = self.study.methods
        names = {methods[name].like or name for name in experiment.methods}
        names |= {self.study.reference} if experiment.budget == "time" else set()
        return [(pair, method) for pair in experiment.pairs for name, method in methods.items() if name in names]

    def _prepare(self) -> Iterator[Stage]:
        """Yield the steps of the preparation. A step reads the results of the one before it, or of those it names."""
        before: tuple[str, ...] = ()
        for step in self.study.prepare:
            name = f"prepare/{step['name']}"
            if "train" in step:
                folder = self.study.save / step["name"]
                options = as_arguments(step["train"], name)
                command = ("train.py", "--save", str(folder), "--resume", "auto", *options)
                product = folder / "last"
            else:
                command, product = tuple(shlex.split(step["run"])), Path(step["product"])
            yield Stage(name, command, (product,), tuple(f"prepare/{each}" for each in step.get("after", ())) or before)
            before = (name,)

    def _stages_of(self, run: Run, steps: tuple[str, ...]) -> Iterator[Stage]:
        folder = self.folder(run)
        options = as_arguments(run.settings, run.name)
        command = ("train.py", "--save", str(folder), "--resume", "auto", *options)
        yield Stage(run.name, command, (folder / "last",), self._needed(run.settings, steps))
        for name, more in evaluations_of(run, self.study).items():
            paths = ("--model-path", str(folder / STUDENT), "--save", str(folder / name), "--overwrite")
            evaluate = {**self.study.evaluate, **more}
            command = ("evaluate.py", *paths, *as_arguments(evaluate, "evaluate"))
            before = (run.name, *self._needed(evaluate, steps))
            yield Stage(f"{run.name}/{name}", command, (folder / name / "results.json",), before)

    def _settings(self, pair: str, method: StudyMethod, rate: float, seed: int, more: Options, steps: int) -> Options:
        study = self.study
        seeds = {"seed": seed, "seed_order": 1000 * seed}  # the order of a pass depends on seed_order + its number
        merged = {**study.train, **study.pairs[pair], **method.options, **more}
        if merged.get("method") == "minillm":
            seeds["seed_ppo"] = seed
        schedule = {"total_iters": steps, "eval_interval": -(-steps // study.evaluations)}
        return {**merged, "lr": rate, **seeds, **schedule}

    def _timing_runs(self, pair: str, method: StudyMethod) -> list[Run]:
        """Return runs of a third of the updates and of all updates, whose difference is the time of the other steps.

        Both have as many evaluations. There are none while the method's settings are not chosen.
        """
        if (choice := self.choice(pair, method)) is None:
            return []
        return [
            Run("timing", pair, method.name, f"updates{steps}-{number}",
                self._settings(pair, method, choice.rate, self.study.rate_seed, choice.options, steps))
            for number in range(TIMINGS)
            for steps in self._timed_steps
        ]  # fmt: skip

    @property
    def _timed_steps(self) -> tuple[int, int]:
        """Numbers of updates of the timing runs."""
        return max(1, self.study.updates // 3), max(2, self.study.updates)

    def _tuning_run(self, pair: str, method: StudyMethod, rate: float, options: Options) -> Run:
        label = "-".join([f"lr{rate:g}", *(f"{name}={value}" for name, value in options.items())])
        settings = self._settings(pair, method, rate, self.study.rate_seed, options, self.study.updates)
        return Run("rates", pair, method.name, label.replace("/", "_").replace(" ", "_"), settings)

    def dev_score(self, run: Run) -> float | None:
        """Return the best ROUGE-L of a finished run on the dev set, None if it has not ended."""
        if run.name not in self.done:
            return None
        path = self.folder(run) / "metrics.jsonl"
        return _best_rouge(path, path.stat().st_mtime_ns)

    def tuning_runs(self, pair: str, method: StudyMethod) -> list[Run]:
        """Return the runs of a method's choice that are known so far."""
        return self._tuned_so_far(pair, method)[1]

    def rate_scores(self, pair: str, name: str) -> dict[float, float]:
        """Return the dev scores of a method's finished runs by rate, those that try other options left out."""
        scores = self._rates(pair, self.study.methods[name])[1]
        return {rate: score for rate, score in scores.items() if score is not None}

    def choice(self, pair: str, method: StudyMethod) -> Choice | None:
        """Return what was chosen for a method, None while runs are missing."""
        return self._tuned_so_far(pair, self.study.methods[method.like] if method.like else method)[0]

    def _tuned_so_far(self, pair: str, method: StudyMethod) -> tuple[Choice | None, list[Run]]:
        key = (pair, method.name)
        if key not in self._known:
            self._known[key] = self._tune(pair, method)
        return self._known[key]

    def _tune(self, pair: str, method: StudyMethod) -> tuple[Choice | None, list[Run]]:
        """Choose the rate, extending the rates at an end that is the best, then each option at that rate."""
        runs, scores, bracketed = self._rates(pair, method)
        if None in scores.values():
            return None, runs
        known: dict[float, Any] = scores
        rate = max(known, key=lambda each: known[each])
        best, chosen = known[rate], dict[str, Any]()
        for name, values in method.tune.items():
            trials = [self._tuning_run(pair, method, rate, {**chosen, name: value}) for value in values]
            runs += trials
            results = [self.dev_score(run) for run in trials]
            if None in results:
                return None, runs
            for value, score in zip(values, results):
                if score is not None and score > best:
                    best, chosen = score, {**chosen, name: value}
        return Choice(rate, chosen, best, bracketed), runs

    def _rates(self, pair: str, method: StudyMethod) -> tuple[list[Run], dict[float, float | None], bool]:
        """Return the runs and dev scores of all rates, and whether the best one lies between two others."""
        rates = list(method.rates)
        for _ in range(2 * MOST_EXTENSIONS + 1):
            runs = [self._tuning_run(pair, method, rate, {}) for rate in rates]
            scores = {rate: self.dev_score(run) for rate, run in zip(rates, runs)}
            if None in scores.values():
                return runs, scores, False
            known: dict[float, Any] = scores
            best = max(known, key=lambda each: known[each])
            if rates[0] < best < rates[-1]:
                return runs, scores, True
            lowest, highest = method.rates[0] / 2**MOST_EXTENSIONS, method.rates[-1] * 2**MOST_EXTENSIONS
            if best == rates[0] > lowest:
                rates = [best / 2, *rates]
            elif best == rates[-1] < highest:
                rates = [*rates, best * 2]
            else:
                break
        return runs, scores, False

    def experiment_runs(self, experiment: Experiment) -> Iterator[Run]:
        """Yield the runs of an experiment whose method's settings have been chosen."""
        for seed in experiment.seeds:  # a seed of every method first, so that an interrupted study compares all
            for pair in experiment.pairs:
                for name in experiment.methods:
                    method = self.study.methods[name]
                    choice, steps = self.choice(pair, method), self.steps(experiment, pair, method)
                    if choice is None or steps is None:
                        continue
                    base = self.study.methods[method.like or name]
                    own = method.options if method.like else {}
                    more = {**choice.options, **own, **experiment.options}
                    settings = self._settings(pair, base, choice.rate, seed, more, steps)
                    owner = self.owner(experiment, pair, name, seed)
                    yield Run(owner.name, pair, name, f"seed{seed}", settings, experiment.evaluate)

    def owner(self, experiment: Experiment, pair: str, name: str, seed: int) -> Experiment:
        """Return the first experiment with the same run, to which it belongs. The run is made once."""
        terms = self._terms(experiment, pair, name)
        for each in self.study.experiments.values():
            declared = pair in each.pairs and name in each.methods and seed in each.seeds
            if declared and self._terms(each, pair, name) == terms:
                return each
        return experiment

    def _terms(self, experiment: Experiment, pair: str, name: str) -> tuple[Options, bool, int | None]:
        """Return all by which the runs of a method with one seed can differ between experiments."""
        return experiment.options, experiment.evaluate, self.steps(experiment, pair, self.study.methods[name])

    def steps(self, experiment: Experiment, pair: str, method: StudyMethod) -> int | None:
        """Return the steps of an experiment's runs, None while the seconds of a step are not known."""
        if experiment.budget == "updates" or method.name == self.study.reference:
            return self.study.updates
        own = self.step_seconds.get((pair, method.like or method.name))
        reference = self.step_seconds.get((pair, self.study.reference))
        return None if not own or not reference else max(1, round(self.study.updates * reference / own))

    @cached_property
    def step_seconds(self) -> dict[tuple[str, str], float]:
        """Seconds of CPU time of a step with the chosen settings, by pair and method."""
        known, (short, long) = {}, self._timed_steps
        for pair in self.study.pairs:
            for method in self.study.methods.values():
                runs = [] if method.like else self._timing_runs(pair, method)
                if not runs or any(run.name not in self.done or run.name not in self.seconds for run in runs):
                    continue
                times = {n: [self.seconds[run.name] for run in runs if run.steps == n] for n in (short, long)}
                spent = statistics.median(times[long]) - statistics.median(times[short])
                known[pair, method.name] = max(0.0, spent) / (long - short)
        return known


@lru_cache(maxsize=10_000)
def _best_rouge(path: Path, changed: int) -> float:
    """Return the best ROUGE-L on the dev set in a run's metrics.jsonl. `changed` is the file's time of change."""
    rows = [row for row in read_metrics(path) if row["event"] == "eval" and row["step"]]
    return float(max((row["rougeL"] for row in rows), default=0.0))
