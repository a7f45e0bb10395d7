"""Compute metrics of the answers that an earlier evaluation has stored, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from promptkd.data.row_files import read_rows
from promptkd.data.rows import reference_texts
from promptkd.distributed.ranks import setup
from promptkd.errors import UserError
from promptkd.evaluation.metrics import answer_columns, with_intervals
from promptkd.evaluation.rouge import exact_match
from promptkd.evaluation.tables import Row, markdown
from promptkd.reporting.results import RESULTS, is_unchanged, read_answers, read_evaluation
from promptkd.utils.files import write_json, write_text


def run(settings: SimpleNamespace) -> None:
    """Add `metrics` to the results folder that --answers names, and print the table. The first rank does the work."""
    ranks = setup(settings.parallel.size, settings.device)
    if ranks.is_main:
        rescore(Path(settings.evaluation.answers), settings.evaluation.metrics)
    ranks.barrier()


def rescore(folder: Path, names: Sequence[str]) -> None:
    """Add metrics to a results folder. Other metrics that it has stay."""
    results = read_evaluation(folder / RESULTS)
    if "self_bleu" in names and len(results["seeds"]) < 2:
        raise UserError(f"--metrics self_bleu needs the answers of several seeds, and {folder} has one: leave it out")
    try:
        limit = results["protocol"]["max_length"] - results["protocol"]["max_prompt_length"]
        for name, entry in results["sets"].items():
            answers = _read_answers(folder / name, entry, results, "exact_match" in names)
            measured = with_intervals(answer_columns(answers, names, limit))
            entry["metrics"] = entry.get("metrics", {}) | measured
        text = markdown(results)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder} is not complete ({error}): evaluate the model again") from None
    write_text(folder / "results.md", text)
    write_json(folder / RESULTS, results)
    print(f"{text}\nwritten to {folder}/")


def _read_answers(folder: Path, entry: dict[str, Any], results: dict[str, Any], match: bool) -> list[list[Row]]:
    """Return a set's answers with each seed. `match` asks for exact match, which needs the references' file."""
    if match and not is_unchanged(entry):
        problem = f"{entry['file']} is missing or has changed since the evaluation"
        raise UserError(f"{problem}: restore it, or leave exact_match out of --metrics")
    references = [reference_texts(row, where) for where, row in read_rows(entry["file"])] if match else repeat([])
    tokenizer, examples = results["protocol"]["rouge_tokenizer"], len(entry["rougeL_rows"][0])
    return [
        [
            Row(place, i, row["answer"], row["length"], row["rougeL"], exact_match(row["answer"], texts, tokenizer))
            for i, (row, texts) in enumerate(zip(read_answers(folder, seed, examples), references))
        ]
        for place, seed in enumerate(results["seeds"])
    ]
