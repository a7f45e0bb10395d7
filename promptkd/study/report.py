"""Write what a study has found so far: report.md with tables, pictures, and study.json with every run."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from promptkd.evaluation.metrics import METRICS
from promptkd.reporting.document import Section, markdown_page
from promptkd.study.claims import claims_table
from promptkd.study.declaration import Study
from promptkd.study.grid import Grid
from promptkd.study.pictures import draw_differences, draw_exposure, draw_rates
from promptkd.study.results import CURVES, MEASURES, Comparison, Trained, collect
from promptkd.study.run import Choice
from promptkd.study.runner import read_seconds, read_state
from promptkd.utils.files import write_json, write_text
from promptkd.utils.format import format_spread
from promptkd.utils.tables import Cell, Table

SPREAD = (
    "Mean ± standard deviation over training seeds, of which each is the mean of its sampling seeds. all: the mean of "
    "the test sets, also of further evaluations, such as all: greedy. Bold: the best."
)
DIFFERENCE = (
    "ROUGE-L of all test sets minus the reference's: hierarchical bootstrap over training seeds and examples, 95 % "
    "interval, and the p-value corrected for the number of methods (Holm)."
)
RATES = (
    "Best ROUGE-L on the dev set, of one run for each rate. Bold: the chosen rate. A method's rates continue "
    "by factors of two until the best lies between two others."
)
STUDENTS = "Metrics of the answers and of the references, as means of the test sets (docs/evaluation.md)."
EXPOSURE = "At the last measurement: excess accumulated error in percent, R and epsilon. Mean ± standard deviation."


def write_report(study: Study) -> str:
    """Write the report on the runs that are done.

    Returns:
        Where it is, and how many commands are done.
    """
    state = read_state(study, study.save / "stages.json", read_seconds(study.save / "seconds.json"))
    grid, comparisons = state.grid, collect(study, state.grid)
    sections = [claims_table(comparisons, grid), *_rate_sections(grid)]
    for comparison in comparisons:
        sections += _comparison_sections(comparison, grid)
    links = _draw(grid, comparisons, study.save)
    text = markdown_page(study.title, [section for section in sections if section.parts], "\n\n".join(links))
    write_text(study.save / "report.md", text)
    write_json(study.save / "study.json", numbers_of(grid, comparisons))
    return f"{len(state.done)} of {state.total} commands are done: {study.save}/report.md, study.json"


def _draw(grid: Grid, comparisons: list[Comparison], save: Path) -> list[str]:
    """Draw the pictures that have data. Return their links for Markdown."""
    drawn: dict[str, bool] = {}
    for pair in grid.study.pairs:
        drawn[f"rates-{pair}.png"] = draw_rates(grid, pair, save / f"rates-{pair}.png")
    for each in comparisons:
        name = f"{each.experiment.name}-{each.pair}.png"
        draw = draw_differences if each.experiment.evaluate else draw_exposure
        drawn[name] = draw(each, save / name)
    return [f"![{name.removesuffix('.png')}]({name})" for name, done in drawn.items() if done]


def _rate_sections(grid: Grid) -> list[Section]:
    """Build a table of dev scores by method and rate for each pair."""
    sections = []
    for pair in grid.study.pairs:
        scores = {name: grid.rate_scores(pair, name) for name, each in grid.study.methods.items() if not each.like}
        scores = {name: each for name, each in scores.items() if each}
        rates = sorted({rate for each in scores.values() for rate in each})
        table = Table(["method", *(f"{rate:g}" for rate in rates), "chosen options"])
        for name, each in scores.items():
            choice = grid.choice(pair, grid.study.methods[name])
            cells = [Cell(f"{each[rate]:.2f}" if rate in each else "-", _mark(choice, rate)) for rate in rates]
            table.add(name, *cells, _chosen(choice))
        sections.append(Section(f"Rates: {pair}", [table, RATES] if table.rows else []))
    return sections


def _mark(choice: Choice | None, rate: float) -> str:
    return "strong" if choice is not None and choice.rate == rate else ""


def _chosen(choice: Choice | None) -> str:
    if choice is None:
        return "not yet chosen"
    options = ", ".join(f"{name} {value}" for name, value in choice.options.items())
    return options if choice.bracketed else f"{options} (the best rate is at an end)".strip()


def _comparison_sections(comparison: Comparison, grid: Grid) -> list[Section]:
    title = f"{comparison.experiment.name}: {comparison.pair}"
    if not comparison.experiment.evaluate:
        return [Section(f"Exposure bias, {title}", [_exposure_table(comparison), EXPOSURE])]
    parts: list[Any] = [_score_table(comparison), SPREAD]
    if comparison.differences:
        parts += [_difference_table(comparison), DIFFERENCE]
    parts += [_student_table(comparison), STUDENTS, _cost_table(comparison, grid)]
    return [Section(title, parts)]


def spread(values: list[float], digits: int = 2) -> str:
    """Format mean ± standard deviation, or a single value."""
    return format_spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, digits)


def _score_table(comparison: Comparison) -> Table:
    """Build the table of ROUGE-L by method and test set."""
    sets, trained = comparison.sets, comparison.trained
    further = list(next(iter(trained.values())).further)
    heads = [*(name or "all" for name in sets), "all: exact match", *(f"all: {name}" for name in further)]
    table = Table(["method", "seeds", *heads])
    columns = [*((name, "rougeL") for name in sets), ("", "exact_match")]
    values = {
        name: [each.means(*column) for column in columns] + [each.further_means(key) for key in further]
        for name, each in trained.items()
    }
    best = [max(map(statistics.fmean, column)) for column in zip(*values.values())]
    for name, scores in values.items():
        styles = ["strong" if statistics.fmean(one) == top else "" for one, top in zip(scores, best)]
        table.add(name, str(len(trained[name].runs)), *map(Cell, map(spread, scores), styles))
    return table


def _cost_table(comparison: Comparison, grid: Grid) -> Table:
    """Build the table of what the runs cost."""
    table = Table(["method", "rate", "options", "updates", "CPU s per update"])
    for name, each in comparison.trained.items():
        run, choice = each.runs[0], grid.choice(comparison.pair, grid.study.methods[name])
        cost = grid.step_seconds.get((comparison.pair, name))
        cost_text = "-" if cost is None else f"{cost:.3f}"
        table.add(name, f"{run.settings['lr']:g}", _chosen(choice), str(run.steps), cost_text)
    return table


def _student_table(comparison: Comparison) -> Table:
    """Build the table of the other metrics of evaluate.py, as the means of all test sets."""
    values = {name: each.measured() for name, each in comparison.trained.items()}
    shown = [key for key in METRICS if key != "rougeL" and all(key in each for each in values.values())]
    table = Table(["method", *(METRICS[key].label for key in shown)])
    for name, each in values.items():
        table.add(name, *(spread(each[key]) for key in shown))
    return table


def _difference_table(comparison: Comparison) -> Table:
    table = Table([f"against {comparison.reference}", "difference", "95 %", "p (Holm)"])
    for name, (one, p) in comparison.differences.items():
        table.add(name, *dataclasses.replace(one, p=p).cells())
    return table


def _exposure_table(comparison: Comparison) -> Table:
    table = Table(["method", "seeds", "excess, %", "R", "epsilon"])
    for name, each in comparison.trained.items():
        lasts = [[values[-1] for values in each.curves(key)[1]] for key in CURVES]
        table.add(name, str(len(each.runs)), *(spread(values) for values in lasts))
    return table


def numbers_of(grid: Grid, comparisons: list[Comparison]) -> dict[str, Any]:
    """Return the content of study.json: the choices, and settings and scores of every finished run."""
    choices = {
        pair: {
            name: {"dev_rougeL": grid.rate_scores(pair, name), "choice": choice and choice._asdict()}
            for name, method in grid.study.methods.items()
            if not method.like and (grid.rate_scores(pair, name) or grid.choice(pair, method))
            for choice in [grid.choice(pair, method)]
        }
        for pair in grid.study.pairs
    }
    rows = [row for each in comparisons for trained in each.trained.values() for row in _runs(trained, grid)]
    runs = [*{row["name"]: row for row in rows}.values()]  # experiments share equal runs
    differences = {
        f"{each.experiment.name}/{each.pair}": {
            name: {"mean": one.mean, "low": one.low, "high": one.high, "p_holm": p}
            for name, (one, p) in each.differences.items()
        }
        for each in comparisons
    }
    shared = {key: _short(value, grid.study.save) for key, value in grid.study.train.items()}
    found = {"choices": choices, "runs": runs, "differences": differences}
    return {"title": grid.study.title, "shared_settings": shared, **found}


def _runs(trained: Trained, grid: Grid) -> list[dict[str, Any]]:
    """Return each run's settings, without those that all runs share, and its scores."""
    rows, shared = [], grid.study.train
    for place, run in enumerate(trained.runs):
        own = {key: value for key, value in run.settings.items() if key not in shared or shared[key] != value}
        settings = {key: _short(value, grid.study.save) for key, value in own.items()}
        row: dict[str, Any] = {"name": run.name, "settings": settings, "cpu_seconds": grid.seconds.get(run.name)}
        if trained.evaluations:
            sets = trained.evaluations[place]["sets"]
            row["scores"] = {n: {key: round(e[key]["mean"], 3) for key in MEASURES} for n, e in sets.items()}
            row["further"] = {key: round(trained.further_means(key)[place], 3) for key in trained.further}
            row["metrics"] = {key: round(values[place], 4) for key, values in trained.measured().items()}
        if curves := {key: trained.curves(key)[1][place] for key in CURVES if trained.curves(key)[0]}:
            row["exposure_bias"] = {"step": trained.curves(CURVES[0])[0], **curves}
        rows.append(row)
    return rows


def _short(value: Any, save: Path) -> Any:
    return value.replace(str(save), "{save}") if isinstance(value, str) else value
