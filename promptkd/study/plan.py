"""How many runs a study has, and how many hours they take at the seconds that finished ones were measured at."""

from __future__ import annotations

from statistics import fmean

from promptkd.study.declaration import Study
from promptkd.study.grid import Grid
from promptkd.study.run import is_evaluation
from promptkd.study.runner import State, read_seconds, read_state
from promptkd.utils.tables import Table

NOTE = (
    "CPU hours are those of commands that are left, at the seconds of finished ones of the same kind; - where none has "
    "been measured. Rates that are at an end add runs."
)


def plan_text(study: Study, parallel: int) -> str:
    """Return the table of stages with their runs, and the hours that are left."""
    seconds = read_seconds(study.save / "seconds.json")
    state = read_state(study, study.save / "stages.json", seconds)
    table = Table(["stage", "runs", "done", "left, CPU hours"])
    prepared = [step for step in study.prepare if f"prepare/{step['name']}" in state.record.done]
    table.add("prepare", str(len(study.prepare)), str(len(prepared)), "" if len(prepared) < len(study.prepare) else "0")
    left, unknown = 0.0, 0
    for stage, counts in expected_runs(state.grid).items():
        done = [name for name in state.done if name.startswith(f"{stage}/") and not is_evaluation(name)]
        hours, lacking = _hours_left(state, stage, counts)
        left, unknown = left + hours, unknown + lacking
        table.add(stage, str(sum(counts.values())), str(len(done)), f"{hours:.1f}" + (" + -" if lacking else ""))
    total = f"{left:.1f} CPU hours are left, {left / parallel:.1f} hours with {parallel} runs at a time"
    return "\n".join(
        [table.text(), total + (f", and {unknown} runs that nothing has measured." if unknown else "."), NOTE]
    )


def expected_runs(grid: Grid) -> dict[str, dict[tuple[str, str], int]]:
    """Return the number of runs of each stage by pair and method, whether their settings are known yet or not."""
    study, counts = grid.study, dict[str, dict[tuple[str, str], int]]()
    for run in grid.runs():
        if run.stage in ("timing", "rates"):
            stage = counts.setdefault(run.stage, {})
            stage[run.pair, run.method] = stage.get((run.pair, run.method), 0) + 1
    for experiment in study.experiments.values():
        counts[experiment.name] = {
            (pair, method): len([s for s in experiment.seeds if grid.owner(experiment, pair, method, s) is experiment])
            for pair in experiment.pairs
            for method in experiment.methods
        }
    return counts


def _hours_left(state: State, stage: str, counts: dict[tuple[str, str], int]) -> tuple[float, int]:
    """Return the CPU hours of a stage's runs that are left and were measured, and the number of the others."""
    grid, seconds, hours, lacking = state.grid, state.grid.seconds, 0.0, 0
    experiment = grid.study.experiments.get(stage)
    scoring = {name: value for name, value in seconds.items() if is_evaluation(name)}
    extra = 0.0  # the mean seconds of all evaluations of a run
    if scoring and experiment and experiment.evaluate:
        extra = sum(scoring.values()) / len({name.rpartition("/")[0] for name in scoring})
    for (pair, method), count in counts.items():
        names = [name for name in state.done if name.startswith(f"{stage}/{pair}/{method}/")]
        left = count - len([name for name in names if not is_evaluation(name)])
        base = grid.study.methods[method].like or method
        kinds = (f"{stage}/{pair}/{method}/", f"rates/{pair}/{base}/")
        trained = [value for name, value in seconds.items() if name.startswith(kinds) and not is_evaluation(name)]
        if trained:
            hours += left * (fmean(trained) + extra) / 3600
        else:
            lacking += left
    return hours, lacking
