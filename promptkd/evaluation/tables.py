"""Format the results of an evaluation: results.json, results.md and the answers."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from promptkd.evaluation.metrics import metric_table
from promptkd.evaluation.rouge import mean
from promptkd.evaluation.test_sets import TestSet
from promptkd.utils.files import write_text
from promptkd.utils.format import format_spread
from promptkd.utils.tables import Table


class Row(NamedTuple):
    """A scored answer.

    Attributes:
        seed: Index in the list of seeds.
        index: Index of the test set's row.
        answer: The text.
        length: Number of its tokens, without end-of-text.
        rouge_l: ROUGE-L x 100.
        exact_match: 100 or 0.
        thought: Whether the model thought before it answered.
    """

    seed: int
    index: int  # type: ignore[assignment]  # hides a method of tuples
    answer: str
    length: int
    rouge_l: float
    exact_match: float
    thought: bool = False


def by_seed(rows: list[Row], seeds: int) -> list[list[Row]]:
    """Return the rows of each seed in the order of the set."""
    return [sorted((row for row in rows if row.seed == seed), key=lambda row: row.index) for seed in range(seeds)]


def summary(test_set: TestSet, answers: list[list[Row]], seconds: float) -> dict[str, Any]:
    """Return a set's entry in results.json. `rougeL_rows` has one list per seed, for paired comparisons."""
    return {
        **test_set.record(),
        "rougeL": over_seeds([mean([row.rouge_l for row in rows]) for rows in answers]),
        "exact_match": over_seeds([mean([row.exact_match for row in rows]) for rows in answers]),
        "mean_length": over_seeds([mean([row.length for row in rows]) for rows in answers]),
        "answers_with_thoughts": sum(row.thought for rows in answers for row in rows),
        "seconds": round(seconds, 3),
        "rougeL_rows": [[round(row.rouge_l, 4) for row in rows] for rows in answers],
    }


def over_seeds(values: list[float]) -> dict[str, Any]:
    """Return the values, their mean and their sample standard deviation (None for a single seed)."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"per_seed": values, "mean": statistics.fmean(values), "std": std}


def markdown(results: dict[str, Any]) -> str:
    """Format results.md: one line for each set, then the metrics and the protocol."""
    protocol, seeds = results["protocol"], results["seeds"]
    over = f"mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    table = Table(["set", "rows", "prompts cut", "ROUGE-L", "exact match", "tokens", "seconds"])
    for name, entry in results["sets"].items():
        table.add(*_cells(name, entry))
    for lost in results["missing"]:
        table.add(lost["name"], "missing")
    metrics = {name: entry["metrics"] for name, entry in results["sets"].items()}
    partial = " Partial: fewer rows than the paper's." if any(e["partial"] for e in results["sets"].values()) else ""
    teacher = ["", f"Teacher: {_model_name(results['teacher'])}."] if results.get("teacher") else []
    lines = [
        f"# {_model_name(results['model'])}",
        "",
        table.markdown(),
        "",
        f"ROUGE-L (stemmed, best reference, x 100, --rouge-tokenizer {protocol['rouge_tokenizer']}): {over} "
        f"({', '.join(map(str, seeds))}). Prompts cut: prompts that lost their {protocol['prompt_cut']}. "
        f"Tokens: mean length of an answer.{partial}",
        "",
        metric_table("metric (95 % interval over examples)", metrics).markdown(),
        *teacher,
        "",
        protocol_line(results),
        *(f"\n{lost['name']} is missing ({lost['file']}): {lost['remedy']}." for lost in results["missing"]),
    ]
    return "\n".join(lines) + "\n"


def protocol_line(results: dict[str, Any]) -> str:
    """Describe decoding, limits, precision and devices in one sentence."""
    protocol, run = results["protocol"], results["run"]
    return (
        f"{_decoding(protocol)}, at most {protocol['max_prompt_length']} tokens of prompt and "
        f"{protocol['max_length']} in total, {run['dtype']} on {run['ranks']} x {run['device']}."
    )


def _model_name(model: dict[str, Any]) -> str:
    """Return a model's path, and the path of the soft prompt in front of its input, if there is one."""
    prompt = model.get("prompt")
    return model["path"] + (f" with the soft prompt {prompt['path']}" if prompt else "")


def _cells(name: str, entry: dict[str, Any]) -> list[str]:
    if entry["partial"]:
        name += f" (partial: {entry['rows']:,} of {entry['published_rows']:,})"
    digits = {"rougeL": 2, "exact_match": 2, "mean_length": 1}
    values = [format_spread(entry[key]["mean"], entry[key]["std"], count) for key, count in digits.items()]
    return [name, f"{entry['rows']:,}", str(entry["rows_cut"]), *values, f"{entry['seconds']:.1f}"]


def _decoding(protocol: dict[str, Any]) -> str:
    size = protocol["no_repeat_ngram_size"]
    repeats = f"no repeated {size}-gram" if size else "repeats allowed"
    if not protocol["do_sample"]:
        return f"Greedy decoding, {repeats}"
    return (
        f"Sampling (temperature {protocol['temperature']:g}, top-k {protocol['top_k']}, "
        f"top-p {protocol['top_p']:g}), {repeats}"
    )


def write_answers(folder: Path, rows: list[Row]) -> None:
    """Write answers.jsonl of one set and seed, one line for each row of the set."""
    lines = [
        json.dumps({"index": r.index, "answer": r.answer, "rougeL": round(r.rouge_l, 4), "length": r.length})
        for r in rows
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "answers.jsonl", "\n".join(lines) + "\n")
