"""Write the report in three forms: Markdown with one picture, one HTML page, and JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from promptkd.data.row_files import read_rows
from promptkd.data.rows import read_row, reference_texts, render_prompt
from promptkd.errors import UserError
from promptkd.evaluation.metrics import metric_table
from promptkd.reporting.bootstrap import Difference
from promptkd.reporting.costs import cost, cost_table
from promptkd.reporting.curves import draw_picture, draw_svg, panels_of
from promptkd.reporting.document import Answers, Section, html_page, markdown_page
from promptkd.reporting.results import Result, exposure_differences, is_unchanged
from promptkd.reporting.tables import (
    difference_table,
    differences_to,
    exposure_table,
    protocol_table,
    score_table,
    sets_of,
    settings_table,
)
from promptkd.utils.files import write_json, write_text
from promptkd.utils.strict_json import is_kind
from promptkd.utils.tables import Table

PICTURE, MARKDOWN, PAGE, NUMBERS = "curves.png", "report.md", "report.html", "report.json"
PICTURE_LINK = f"![dev loss, dev ROUGE-L, the soft prompt and exposure bias]({PICTURE})"


@dataclass(frozen=True)
class Contents:
    """The content of a report."""

    title: str
    compared: list[Result]
    references: list[Result]
    baseline: Result | None  # one of the other results
    samples: int  # examples of each set whose answers are shown

    @property
    def results(self) -> list[Result]:
        return [*self.compared, *self.references]

    @cached_property
    def differences(self) -> dict[str, dict[str, Difference]]:
        """Differences to the baseline by result and set, empty without a baseline."""
        return differences_to(self.baseline, self.results) if self.baseline else {}


def find_baseline(name: str | None, results: list[Result]) -> Result | None:
    """Look up the result with a name.

    Raises:
        UserError: If no result has it. The message lists the names.
    """
    if name is None:
        return None
    for result in results:
        if result.name == name:
            return result
    names = ", ".join(result.name for result in results)
    raise UserError(f"--baseline {name}: no result has this name: use one of {names}")


def write_report(contents: Contents, save: Path) -> str:
    """Write all forms of the report to the folder `save`.

    Returns:
        The section with the scores as Markdown, for the terminal.

    Raises:
        UserError: If the results are not usable or the folder cannot be written.
    """
    panels = panels_of(contents.compared, contents.references)
    curves = Section("Curves", pictures={panel.title: draw_svg(panel) for panel in panels})
    scores = _scores(contents)
    sections = [
        scores,
        _metrics(contents),
        curves,
        _protocols(contents),
        _exposure(contents),
        _costs(contents),
        _answers(contents),
    ]
    sections.append(_settings(contents))
    texts = {
        PAGE: html_page(contents.title, sections),
        MARKDOWN: markdown_page(contents.title, sections, PICTURE_LINK),
    }
    numbers = numbers_of(contents)
    try:
        save.mkdir(parents=True, exist_ok=True)
        if panels:
            draw_picture(panels, save / PICTURE)
        for name, text in texts.items():
            write_text(save / name, text)
        write_json(save / NUMBERS, numbers)
    except OSError as error:
        raise UserError(f"--save {save} cannot be written ({error.strerror}): name another folder") from None
    return scores.markdown()


def _scores(contents: Contents) -> Section:
    counts = sorted({len(result.evaluation["seeds"]) for result in contents.results})
    italics = " Italics: references, not compared." if contents.references else ""
    parts: list[str | Table | Answers] = [
        score_table(contents.compared, contents.references),
        *_partial_sets(contents.results),
        *ranking(contents.compared, contents.references),
        f"Mean ± standard deviation over {' or '.join(map(str, counts))} seeds of sampling, of one training run each: "
        f"the spread says nothing about other training runs. Bold: the best.{italics}",
    ]
    if contents.baseline is not None:
        parts += [
            difference_table(contents.baseline, contents.results, contents.differences),
            f"ROUGE-L minus {contents.baseline.label}'s, by paired bootstrap over the examples of a set (each with the "
            "mean of its seeds, 10,000 resamples): 95 % interval and two-sided p-value, without a correction for the "
            "number of comparisons.",
        ]
    return Section("", parts)


def _partial_sets(results: list[Result]) -> list[str]:
    """Name the sets of which fewer rows were answered than for the paper's table."""
    partial = {
        f"{name} ({entry['rows']:,} of {entry['published_rows']:,})": None
        for result in results
        for name, entry in result.sets.items()
        if is_kind(entry, {"rows": int, "published_rows": int}) and entry["rows"] < entry["published_rows"]
    }
    return [f"Partial, fewer rows than in the paper's table: {', '.join(partial)}."] if partial else []


def ranking(compared: list[Result], references: list[Result]) -> list[str]:
    """Write a sentence for each test set: the order of the models, and which neighbors differ by less than a spread."""
    sentences = []
    for name in sets_of(compared):
        scored = [(result.label, score) for result in compared if (score := result.score(name))]
        scored.sort(key=lambda pair: -pair[1]["mean"])
        others = [(result.label, score) for result in references if (score := result.score(name))]
        order, around = (", ".join(f"{label} {score['mean']:.2f}" for label, score in x) for x in (scored, others))
        close = [
            f"{label} and {next_label}"
            for (label, score), (next_label, next_score) in pairwise(scored)
            if score["mean"] - next_score["mean"] < max(score["std"] or 0.0, next_score["std"] or 0.0)
        ]
        sentence = f"ROUGE-L on {name}: {order}" + (f" ({around})." if around else ".")
        sentences.append(sentence + (f" Closer than the spread over seeds: {'; '.join(close)}." if close else ""))
    return sentences


def _metrics(contents: Contents) -> Section:
    """Show all metrics of all models for each set, and say where KL divergences are to different teachers."""
    section = Section("Metrics")
    for name in sets_of(contents.results):
        columns = {each.label: each.sets.get(name, {}).get("metrics", {}) for each in contents.results}
        table = metric_table(name, columns)
        section.parts += [table] if table.rows else []
    if section.parts:
        section.parts.append("With the 95 % interval over examples. docs/evaluation.md defines the metrics.")
    teachers = {each.label: each.evaluation.get("teacher") for each in contents.results}
    named = {label: teacher for label, teacher in teachers.items() if teacher is not None}
    if any(teacher != next(iter(named.values())) for teacher in named.values()):
        section.parts.append(f"KL divergences are to different teachers: {', '.join(named)} do not have the same.")
    return section


def _protocols(contents: Contents) -> Section:
    table = protocol_table(contents.results)
    note = "Rows that differ are not comparable to the first."
    return Section("Different protocols", [note, table] if table.rows else [])


def _exposure(contents: Contents) -> Section:
    table = exposure_table(contents.results)
    note = "Excess accumulated error of the student at the last response token (evaluate.py --type exposure_bias)."
    warnings = [
        f"{other.label} is not comparable to {first.label}, it was measured with different {differences}."
        for first, other, differences in exposure_differences(contents.results)
    ]
    return Section("Exposure bias", [table, note, *warnings] if table.rows else [])


def _costs(contents: Contents) -> Section:
    table = cost_table(contents.results)
    note = (
        "Time: the number of steps x the median time of their parts, so that pauses count little; evaluations are "
        "left out. Other work on the machine slows steps down. Peak memory: of one rank. Student, teacher, "
        "prompt: numbers of parameters, the teacher's not trained. Share: the prompt's of the teacher's."
    )
    return Section("Costs", [table, note] if table.rows else [])


def _answers(contents: Contents) -> Section:
    """Show each model's answers to the first examples of each set with the first seed, and name sets left out."""
    answers: list[Answers] = []
    notes = []
    for name, entry in contents.compared[0].sets.items() if contents.samples else ():
        if not is_unchanged(entry):
            notes.append(f"{name}: without answers, since {entry['file']} is missing or changed after the evaluation.")
            continue
        rows = read_rows(entry["file"])[: contents.samples]
        texts = {}
        for result in contents.results:
            if result.sets.get(name, {}).get("sha256") == entry["sha256"]:
                texts[result.label] = result.answers(name)
        examples = []
        for index, (where, row) in enumerate(rows):
            prompt, references = render_prompt(read_row(row, where), where), reference_texts(row, where)
            by_name = {"reference": references[0], **{label: answers[index] for label, answers in texts.items()}}
            examples.append((str(row.get("instruction", prompt)), by_name))
        answers += [Answers(name, examples)] if examples else []
    lead = ["The first rows of each test set, first seed."] if answers else []
    return Section("Answers", [*lead, *notes, *answers])


def _settings(contents: Contents) -> Section:
    section = Section("How it was made", [settings_table(contents.results)])
    if run := next((result.config for result in contents.results if result.config), None):
        versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
        section.parts.append(
            f"Commit {run.get('commit')}, Python {run.get('python')}, {versions}. "
            "Every run's config.json holds all its settings."
        )
    return section


def numbers_of(contents: Contents) -> dict[str, Any]:
    """Return the content of report.json."""
    return {
        "title": contents.title,
        "baseline": contents.baseline and contents.baseline.name,
        "models": [_numbers_of_result(result, contents) for result in contents.results],
    }


def _numbers_of_result(result: Result, contents: Contents) -> dict[str, Any]:
    spent, sets = cost(result), {}
    for name, entry in result.sets.items():
        difference = contents.differences.get(result.name, {}).get(name)
        sets[name] = {
            "rougeL": entry["rougeL"],
            "exact_match": entry["exact_match"],
            "metrics": entry.get("metrics", {}),
            "difference": difference and dataclasses.asdict(difference),
        }
    return {
        "name": result.name,
        "folder": str(result.folder),
        "reference": result in contents.references,
        "seeds": result.evaluation["seeds"],
        "protocol": result.evaluation["protocol"],
        "sets": sets,
        "cost": spent and {**dataclasses.asdict(spent), "prompt_share": spent.prompt_share},
        "exposure_bias": result.exposure,
    }
