"""Read what train.py and evaluate.py left in a result folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptkd.data.jsonl import read_jsonl
from promptkd.errors import UserError
from promptkd.metrics import read_metrics
from promptkd.strict_json import check_kind, is_kind, read_object

REMEDY = "make the folder anew with train.py and evaluate.py"
SPREAD = {"per_seed": [float], "mean": float, "std": (float, None)}
SET = {"file": str, "sha256": str, "rougeL": SPREAD, "exact_match": SPREAD}
RESULTS = {"model": {"path": str}, "protocol": {...: object}, "seeds": [int], "sets": {...: SET}}
CONFIG = {"settings": {...: object}, "commit": (str, None), "python": str, "versions": {...: str}}


@dataclass(frozen=True)
class Result:
    """One trained and evaluated model; its name is its folder's.

    metrics: rows of metrics.jsonl; config: config.json; evaluation: results.json of `folder/eval`.
    """

    name: str
    folder: Path
    metrics: list[dict[str, Any]]
    config: dict[str, Any]
    evaluation: dict[str, Any]

    @property
    def sets(self) -> dict[str, Any]:
        return self.evaluation["sets"]

    def series(self, key: str, event: str = "train") -> tuple[list[int], list[float]]:
        """Steps and values of a metric; both empty when the run has none."""
        points = [(row["step"], row[key]) for row in self.metrics if row["event"] == event and key in row]
        if wrong := [value for _, value in points if not is_kind(value, float)]:
            raise UserError(f"{self.folder}/metrics.jsonl: {key} is {wrong[0]!r}, no number: {REMEDY}")
        return [step for step, _ in points], [value for _, value in points]

    def answers(self, name: str) -> list[str]:
        """The answers to a set, of the first seed."""
        file = self.folder / "eval" / name / f"seed{self.evaluation['seeds'][0]}" / "answers.jsonl"
        rows = read_jsonl(file)
        for number, row in enumerate(rows, 1):
            if not isinstance(row.get("answer"), str):
                raise UserError(f'{file}, line {number}: it has no text "answer": {REMEDY}')
        return [row["answer"] for row in rows]


def read_result(folder: str) -> Result:
    """Read one folder. Raises UserError naming what is missing and what makes it."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder: name folders that train.py --save has written")
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{metrics} is not there: {path} is no result folder, or train.py --save {path} is to be run")
    config = _read_json(path / "config.json", CONFIG, f"train.py --save {path} writes it")
    evaluation = _read_json(path / "eval" / "results.json", RESULTS, f"evaluate.py --save {path / 'eval'} writes it")
    if not evaluation["seeds"] or not evaluation["sets"]:
        raise UserError(f"{path}/eval/results.json: it has no seeds or no test sets: {REMEDY}")
    rows = read_metrics(metrics)
    if not rows:
        raise UserError(f"{metrics}: it holds no rows: {REMEDY}")
    return Result(path.name, path, rows, config, evaluation)


def check_comparable(results: list[Result]) -> None:
    """Raise UserError when results are not of the same protocol, seeds and test sets: a table would mislead."""
    first = results[0]
    for other in results[1:]:
        for what, one, two in (
            ("protocol", first.evaluation["protocol"], other.evaluation["protocol"]),
            ("seeds", first.evaluation["seeds"], other.evaluation["seeds"]),
            ("test sets", _fingerprints(first), _fingerprints(other)),
        ):
            if one != two:
                raise UserError(
                    f"{first.folder} and {other.folder} were evaluated with different {what}: evaluate one of them anew"
                )
    if len({result.name for result in results}) < len(results):
        raise UserError("two result folders have the same name, and it names their rows: rename one of them")


def _fingerprints(result: Result) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in result.sets.items()}


def _read_json(path: Path, kind: dict, remedy: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is not there: {remedy}")
    content = read_object(path, remedy)
    try:
        check_kind(content, kind, path.name)
    except ValueError as error:
        raise UserError(f"{path}: {error}: {remedy}") from None
    return content
