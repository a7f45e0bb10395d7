"""The report: table, curves, answers side by side, how it was made. One Markdown file and one picture."""

from __future__ import annotations

from pathlib import Path

from promptkd.data.examples import prompt_and_references
from promptkd.data.jsonl import read_jsonl
from promptkd.errors import UserError
from promptkd.evaluation.tables import write_text
from promptkd.reporting.curves import draw_comparison
from promptkd.reporting.results import Result
from promptkd.reporting.table import label, ranking, table

PICTURE = "curves.png"
SHOWN_OPTIONS = ("method", "lr", "lr_decay_style", "batch_size", "total_iters", "data_dir", "model_path")
LONGEST_TEXT = 160  # characters of a prompt or an answer in the table


def write_report(title: str, compared: list[Result], references: list[Result], samples: int, save: Path) -> str:
    """Write report.md and its picture below `save`; returns the part that is worth a place on the screen."""
    seeds = compared[0].evaluation["seeds"]
    summary = f"{table(compared, references)}\n\n{ranking(compared, references)}"
    parts = [
        f"# {title}",
        f"{summary}\n\nMean ± standard deviation over {len(seeds)} seeds of sampling, of one training run each: the "
        "spread says nothing about other training runs. In italics: reference lines, not compared.",
        f"![dev loss, dev ROUGE-L and the soft prompt during training]({PICTURE})",
        *([_answers(compared, references, samples)] if samples else []),
        _settings([*references, *compared]),
    ]
    draw_comparison(compared, references, save / PICTURE)
    write_text(save / "report.md", "\n\n".join(parts) + "\n")
    return summary


def _answers(compared: list[Result], references: list[Result], samples: int) -> str:
    """The first rows of each set, and what each model answered with the first seed."""
    shown, parts = [*compared, *references], ["## Answers\n\nThe first rows of each test set, first seed."]
    for name, entry in compared[0].sets.items():
        lines = [f"| {name} | reference | {' | '.join(map(label, shown))} |", "|---" * (len(shown) + 2) + "|"]
        answers = [result.answers(name) for result in shown]
        rows = read_jsonl(entry["file"])[:samples]
        for result, texts in zip(shown, answers):
            if len(texts) < len(rows):
                raise UserError(f"{result.folder}: answers.jsonl of {name} has {len(texts)} rows: evaluate it anew")
        for place, row in enumerate(rows):
            prompt, gold = prompt_and_references(row)
            cells = [row.get("instruction", prompt), gold[0], *(texts[place] for texts in answers)]
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    """A text that stays within a Markdown cell."""
    text = " ".join(text.split())
    text = text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 3] + "..."
    for special in "\\`*_|<[#":
        text = text.replace(special, "\\" + special)
    return text


def _settings(results: list[Result]) -> str:
    lines = [f"| run | {' | '.join(SHOWN_OPTIONS)} | evaluated |", "|---" * (len(SHOWN_OPTIONS) + 2) + "|"]
    for result in results:
        options = result.config["settings"]
        cells = [str(options.get(name)) for name in SHOWN_OPTIONS]
        lines.append(f"| {label(result)} | {' | '.join(cells)} | {Path(result.evaluation['model']['path']).name} |")
    first = results[0]
    versions = ", ".join(f"{name} {version}" for name, version in first.config["versions"].items())
    made = f"Commit {first.config['commit']}, Python {first.config['python']}, {versions}."
    return "## How it was made\n\n" + "\n".join(lines) + f"\n\n{made} Every run's config.json holds all its settings."
