"""The report in three forms: Markdown with one picture, one HTML page, and JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from promptkd.data.row_files import read_rows
from promptkd.data.templates import prompt_and_references
from promptkd.errors import UserError
from promptkd.reporting.costs import cost, costs
from promptkd.reporting.curves import draw_picture, draw_svg, panels_of
from promptkd.reporting.page import Answer, Section, page
from promptkd.reporting.results import Result, unlike, unlike_exposure
from promptkd.reporting.table import (
    columns_of,
    differences,
    differences_to,
    exposures,
    label,
    scores,
    settings,
)
from promptkd.utils.files import digest_of, write_json, write_text
from promptkd.utils.strict_json import is_kind
from promptkd.utils.tables import Cell, Table

PICTURE, MARKDOWN, PAGE, NUMBERS = "curves.png", "report.md", "report.html", "report.json"
LONGEST_TEXT = 160  # characters of a prompt or an answer in a Markdown table
SEEN = "dev loss, dev ROUGE-L, the soft prompt and exposure bias"


@dataclass(frozen=True)
class Contents:
    """What a report is made of. baseline: one of the others, or None; samples: rows of each set that are shown."""

    title: str
    compared: list[Result]
    references: list[Result]
    baseline: Result | None
    samples: int

    @property
    def everyone(self) -> list[Result]:
        return [*self.compared, *self.references]


def find_baseline(name: str | None, results: list[Result]) -> Result | None:
    """The result of that name. Raises UserError naming those that are there."""
    if name is None:
        return None
    found = next((result for result in results if result.name == name), None)
    if found is None:
        raise UserError(f"--baseline {name}: no result has this name, only {', '.join(r.name for r in results)}")
    return found


def write_report(contents: Contents, save: Path) -> str:
    """Write all forms below `save`; returns the part that is worth a place on the screen, as Markdown."""
    sections, (answers, lost) = sections_of(contents), answers_of(contents)  # all is read before anything is written
    panels = panels_of(contents.compared, contents.references)
    shown = "\n\n".join(_markdown(section) for section in sections[:1])
    try:
        save.mkdir(parents=True, exist_ok=True)
        if panels:
            draw_picture(panels, save / PICTURE)
    except OSError as error:
        raise UserError(f"--save {save} cannot be written ({error.strerror}): name another folder") from None
    curves = Section("Curves", pictures={panel.title: draw_svg(panel) for panel in panels})
    notes = ["The first rows of each test set, first seed.", *lost] if answers else lost
    said = Section("Answers", [*notes, *answers]) if notes else Section("")
    write_text(save / PAGE, page(contents.title, [sections[0], curves, *sections[1:-1], said, sections[-1]]))
    parts = [f"# {contents.title}", shown, *([f"![{SEEN}]({PICTURE})"] if panels else [])]
    parts += [*map(_markdown, sections[1:-1]), *([_markdown(Section("Answers", notes))] if notes else [])]
    parts += [*_answer_tables(answers), _markdown(sections[-1])]
    write_text(save / MARKDOWN, "\n\n".join(parts) + "\n")
    write_json(save / NUMBERS, numbers_of(contents))
    return shown


def sections_of(contents: Contents) -> list[Section]:
    """Scores first, how it was made last."""
    compared, references, baseline = contents.compared, contents.references, contents.baseline
    counts = sorted({len(result.evaluation["seeds"]) for result in contents.everyone})
    note = (
        f"Mean ± standard deviation over {' or '.join(map(str, counts))} seeds of sampling, of one training run each: "
        "the spread says nothing about other training runs. Bold: the best. Italics: reference lines, not compared."
    )
    first = Section(
        "", [scores(compared, references), *_partial(contents.everyone), *ranking(compared, references), note]
    )
    if baseline is not None:
        first.parts += [
            differences(baseline, contents.everyone),
            f"ROUGE-L minus {label(baseline)}'s, by paired bootstrap over the examples of a set (each with the mean of "
            "its seeds, 10,000 resamplings): 95 % interval and two-sided p-value, without a correction for the number "
            "of comparisons.",
        ]
    made = [first]
    if unlikes := _unlikes(contents.everyone):
        made.append(Section("Different protocols", ["Rows that differ are not comparable to the first.", unlikes]))
    if (measured := exposures(contents.everyone)).rows:
        note = "Excess accumulated error of the student at the last response token (evaluate.py --type exposure_bias)."
        alone = [
            f"{label(other)} is not comparable to {label(first)}, it was measured with different {differences}."
            for first, other, differences in unlike_exposure(contents.everyone)
        ]
        made.append(Section("Exposure bias", [measured, note, *alone]))
    if (spent := costs(contents.everyone)).rows:
        note = (
            "Time: the number of steps x the median time of their parts, so that pauses count little; evaluations are "
            "left out. What else ran on the machine slows them down. Peak memory: of one rank. Student, teacher, "
            "prompt: numbers of parameters, the teacher's not trained. Share: the prompt's of the teacher's."
        )
        made.append(Section("Costs", [spent, note]))
    run = next((result.config for result in contents.everyone if result.config), None)
    parts: list[str | Table] = [settings(contents.everyone)]
    if run:
        versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
        parts.append(
            f"Commit {run.get('commit')}, Python {run.get('python')}, {versions}. "
            "Every run's config.json holds all its settings."
        )
    return [*made, Section("How it was made", parts)]


def ranking(compared: list[Result], references: list[Result]) -> list[str]:
    """One sentence for each test set: who is where, and which neighbours are closer than their spread."""
    sentences = []
    for column in (column for column in columns_of(compared) if column.measure == "rougeL"):
        there = [result for result in compared if column.value(result)]
        ranked = sorted(there, key=lambda result: -column.value(result)["mean"])
        shown, around = (
            ", ".join(f"{label(r)} {column.value(r)['mean']:.2f}" for r in results if column.value(r))
            for results in (ranked, references)
        )
        close = [
            f"{label(one)} and {label(two)}"
            for one, two in pairwise(ranked)
            if column.value(one)["mean"] - column.value(two)["mean"]
            < max(column.value(result)["std"] or 0.0 for result in (one, two))
        ]
        sentence = f"ROUGE-L on {column.set}: {shown}" + (f" ({around})." if around else ".")
        sentences.append(sentence + (f" Closer than the spread over seeds: {'; '.join(close)}." if close else ""))
    return sentences


def _partial(results: list[Result]) -> list[str]:
    """A sentence that names the sets of which fewer rows were answered than the paper's table stands on."""
    found = {
        f"{name} ({entry['rows']:,} of {entry['published_rows']:,})": None
        for result in results
        for name, entry in result.sets.items()
        if is_kind(entry, {"rows": int, "published_rows": int}) and entry["rows"] < entry["published_rows"]
    }
    return [f"Partial, fewer rows than in the paper's table: {', '.join(found)}."] if found else []


def answers_of(contents: Contents) -> tuple[list[Answer], list[str]]:
    """The first rows of each set, and what each model answered with the first seed; sentences on sets left out."""
    found, lost = [], []
    for name, entry in contents.compared[0].sets.items() if contents.samples else ():
        if not _is_same_file(Path(entry["file"]), entry["sha256"]):
            lost.append(f"{name}: without answers, since {entry['file']} is gone or not what it was at the evaluation.")
            continue
        shown = [r for r in contents.everyone if r.sets.get(name, {}).get("sha256") == entry["sha256"]]
        said = {label(result): result.answers(name) for result in shown}
        rows = read_rows(entry["file"])[: contents.samples]
        for result, texts in zip(shown, said.values()):
            if len(texts) < len(rows):
                raise UserError(f"{result.folder}: answers.jsonl of {name} has {len(texts)} rows: evaluate it anew")
        for place, (where, row) in enumerate(rows):
            prompt, gold = prompt_and_references(row, where)
            texts = {"reference": gold[0], **{who: texts[place] for who, texts in said.items()}}
            found.append(Answer(name, str(row.get("instruction", prompt)), texts))
    return found, lost


def _is_same_file(path: Path, sha256: str) -> bool:
    try:
        return path.is_file() and digest_of(path)["sha256"] == sha256
    except OSError:
        return False


def numbers_of(contents: Contents) -> dict[str, Any]:
    """report.json."""
    baseline = contents.baseline
    against = {} if baseline is None else differences_to(baseline, contents.everyone)
    return {
        "title": contents.title,
        "baseline": baseline and baseline.name,
        "models": [
            {
                "name": result.name,
                "folder": str(result.folder),
                "reference": result in contents.references,
                "seeds": result.evaluation["seeds"],
                "protocol": result.evaluation["protocol"],
                "sets": {
                    name: {
                        **{key: entry[key] for key in ("rougeL", "exact_match")},
                        "difference": dataclasses.asdict(against[result.name][name])
                        if name in against.get(result.name, {})
                        else None,
                    }
                    for name, entry in result.sets.items()
                },
                "cost": (spent := cost(result)) and {**dataclasses.asdict(spent), "prompt_share": spent.prompt_share},
                "exposure_bias": result.exposure,
            }
            for result in contents.everyone
        ],
    }


def _unlikes(results: list[Result]) -> Table | None:
    made = Table(["model", f"differs from {label(results[0])} in"], texts=2)
    for result in results[1:]:
        if found := unlike(results[0], result):
            made.rows.append([Cell(label(result)), Cell("; ".join(found))])
    return made if made.rows else None


def _markdown(section: Section) -> str:
    parts = [part.markdown() if isinstance(part, Table) else str(part) for part in section.parts]
    return "\n\n".join([f"## {section.title}", *parts] if section.title else parts)


def _answer_tables(answers: list[Answer]) -> list[str]:
    """A Markdown table for each set, texts cut short."""
    parts = []
    for name in dict.fromkeys(answer.set for answer in answers):
        mine = [answer for answer in answers if answer.set == name]
        made = Table([name, *mine[0].texts], texts=len(mine[0].texts) + 1)
        made.rows = [[Cell(_short(text)) for text in (answer.asked, *answer.texts.values())] for answer in mine]
        parts.append(made.markdown())
    return parts


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 3] + "..."
