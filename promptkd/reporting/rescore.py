"""Compute metrics of the answers that an earlier evaluation has stored, without a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from promptkd.data.row_files import read_rows
from promptkd.data.rows import reference_texts
from promptkd.distributed.ranks import Ranks
from promptkd.errors import UserError
from promptkd.evaluation.metrics import answer_columns, with_intervals
from promptkd.evaluation.rouge import exact_match
from promptkd.evaluation.tables import Row, markdown
from promptkd.reporting.results import RESULTS, is_unchanged, read_evaluation
from promptkd.utils.files import write_json, write_text
from promptkd.utils.jsonl import read_jsonl
from promptkd.utils.strict_json import check_kind

ANSWER = {"index": int, "answer": str, "rougeL": float, "length": int}


def run(settings: SimpleNamespace) -> None:
    """Add `metrics` to the results folder that --answers names, and print the table.

    Metrics that the folder has and that are not asked for stay.
    """
    options = settings.evaluation
    folder = Path(options.answers)
    results = read_evaluation(folder / RESULTS)
    try:
        limit = results["protocol"]["max_length"] - results["protocol"]["max_prompt_length"]
        for name, entry in results["sets"].items():
            answers = _read_answers(folder, name, entry, results, "exact_match" in options.metrics)
            if "self_bleu" in options.metrics and len(answers) < 2:
                raise UserError(f"{folder}: self_bleu needs answers of two seeds: leave it out of --metrics")
            columns = answer_columns(answers, options.metrics, limit, Ranks(0, 1, torch.device("cpu")))
            entry["metrics"] = entry.get("metrics", {}) | with_intervals(columns)
        text = markdown(results)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/{RESULTS} is not complete ({error}): evaluate the model again") from None
    write_text(folder / "results.md", text)
    write_json(folder / RESULTS, results)
    print(f"{text}\nwritten to {folder}/")


def _read_answers(
    folder: Path, name: str, entry: dict[str, Any], results: dict[str, Any], match: bool
) -> list[list[Row]]:
    """Return the answers of each seed. `match` asks for exact match, which needs the references' file."""
    references: list[list[str]] = []
    if match:
        if not is_unchanged(entry):
            raise UserError(
                f"{entry['file']} is missing or has changed since the evaluation: restore it, or leave exact_match out "
                "of --metrics"
            )
        references = [reference_texts(row, where) for where, row in read_rows(entry["file"])]
    tokenizer = results["protocol"]["rouge_tokenizer"]
    answers = []
    for place, seed in enumerate(results["seeds"]):
        file = folder / name / f"seed{seed}" / "answers.jsonl"
        rows, count = read_jsonl(file), len(entry["rougeL_rows"][0])
        try:
            check_kind(rows, [ANSWER], "answers")
        except ValueError as error:
            raise UserError(f"{file}: {error}: evaluate the model again") from None
        if len(rows) != count or (match and count > len(references)):
            raise UserError(f"{file}: {len(rows)} answers do not fit the {count} scores: evaluate the model again")
        scores = [exact_match(row["answer"], texts, tokenizer) for row, texts in zip(rows, references)] or [0.0] * count
        kept = [(row["answer"], row["length"], row["rougeL"]) for row in rows]
        answers.append([Row(place, i, *values, score) for i, (values, score) in enumerate(zip(kept, scores))])
    return answers
