"""Read what train.py and evaluate.py left in a result folder."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from promptkd.errors import UserError
from promptkd.evaluation.test_sets import SET_NAME
from promptkd.utils.jsonl import read_jsonl, read_metrics
from promptkd.utils.strict_json import check_kind, is_kind, read_object

RESULTS, CURVE = "results.json", "exposure_bias.json"
CURVE_KEYS = ("ex_acc_err", "mean_R", "mean_eps", "std_R", "std_eps")
INTERVAL_KEYS = ("ex_acc_err_low", "ex_acc_err_high")  # where the published code measured, there is none
CURVES = {key: [(float, None)] for key in CURVE_KEYS}
MEASURED = {  # how, as far as the file says: the published code's says nothing
    "set": str, "sha256": str, "rows": int, "seeds": [int], "protocol": {...: object}, "teacher": {"path": str},
}  # fmt: skip
SPREAD = {"mean": float, "std": (float, None)}
SET = {"file": str, "sha256": str, "rougeL": SPREAD, "exact_match": SPREAD, "rougeL_rows": [[float]]}
EVALUATION = {"model": {"path": str}, "protocol": {...: object}, "seeds": [int], "sets": {...: SET}}
MEMORY = {"peak_memory_gb": [float]}
CONFIG = {"settings": {...: object}, "commit": (str, None), "python": str, "versions": {...: str}}


@dataclass(frozen=True)
class Result:
    """One evaluated model and, where it was trained here, its run.

    name: its row's; folder: that was named; answers_folder: holds results.json and the answers; metrics: rows of
    metrics.jsonl, config: config.json, both empty for a model that has no run; exposure: set -> exposure_bias.json
    ("" for a file that names no set); memory: the ranks' peaks in GB, empty before a run's end.
    """

    name: str
    folder: Path
    answers_folder: Path
    evaluation: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    exposure: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: list[float] = field(default_factory=list)

    @property
    def sets(self) -> dict[str, Any]:
        return self.evaluation["sets"]

    def series(self, key: str, event: str = "train") -> tuple[list[int], list[float]]:
        """Steps and values of a metric, of a list its last value; both empty when the run has none."""
        points = [(row["step"], row[key]) for row in self.metrics if row["event"] == event and key in row]
        points = [(step, value[-1] if isinstance(value, list) else value) for step, value in points]
        if wrong := [value for _, value in points if not is_kind(value, (float, None))]:
            raise UserError(f"{self.folder}/metrics.jsonl: {key} is {wrong[0]!r}, no number: repeat the run")
        return [step for step, _ in points], [value for _, value in points]

    def rows(self, name: str) -> int:
        """How many rows of a set were answered."""
        return len(self.sets[name]["rougeL_rows"][0])

    def answers(self, name: str) -> list[str]:
        """The answers to a set, of the first seed."""
        file = self.answers_folder / name / f"seed{self.evaluation['seeds'][0]}" / "answers.jsonl"
        rows = read_jsonl(file)
        if not all(isinstance(row.get("answer"), str) for row in rows):
            raise UserError(f"{file}: these are no answers of evaluate.py: evaluate anew, or pass --samples 0")
        return [row["answer"] for row in rows]


def read_result(named: str) -> Result:
    """Read FOLDER or NAME=FOLDER: what train.py --save wrote with an evaluation in "eval", or evaluate.py's --save.

    Beside an evaluation alone the run is looked for around the model that was evaluated. Exposure bias is the folder's
    own, or the run's. Raises UserError naming what is missing or broken, and what makes it.
    """
    label = re.match(r"([^/=]+)=", named)
    folder = Path(named[label.end() :] if label else named)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: name folders that train.py or evaluate.py --save has written")
    inside = folder / RESULTS
    where = folder if inside.is_file() and not (folder / "metrics.jsonl").is_file() else folder / "eval"
    evaluation = _read_evaluation(where / RESULTS)
    run = folder if where != folder else Path(evaluation["model"]["path"]).parent
    metrics, config = run / "metrics.jsonl", run / "config.json"
    exposure = _read_exposure(folder)
    name = label[1] if label else folder.name
    if not metrics.exists():  # around a model that was not trained here, a curve may be of any of its neighbours
        return Result(name, folder, where, evaluation, exposure=exposure)
    again, memory = f"train.py --save {run} writes it", run / "memory.json"
    peaks = _read_json(memory, MEMORY, again)["peak_memory_gb"] if memory.is_file() else []
    rows, settings = _read_rows(metrics), _read_json(config, CONFIG, again)
    return Result(name, folder, where, evaluation, rows, settings, exposure or _read_exposure(run), peaks)


def check_comparable(results: list[Result], mixed: bool = False) -> None:
    """Raise UserError where a table would mislead: unlike protocols, seeds or test sets, of exposure bias too (`mixed`
    allows them).

    Names have to differ in any case.
    """
    names = [result.name for result in results]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two results are called {twice}, and that names their rows: write NAME=FOLDER for one of them")
    for other in results[1:] if not mixed else []:
        if differences := unlike(results[0], other):
            raise UserError(
                f"{results[0].folder} and {other.folder} were evaluated with different {', '.join(differences)}: "
                "evaluate one of them anew, or pass --mixed to have them in one table all the same"
            )
    if found := unlike_exposure(results) if not mixed else []:
        one, other, differences = found[0]
        raise UserError(
            f"exposure bias of {one.folder} and of {other.folder} was measured with different {differences}: "
            "measure one of them anew, or pass --mixed to have them in one table all the same"
        )


def unlike(one: Result, other: Result) -> list[str]:
    """What of two evaluations differs: options of the protocol with both values, seeds, test sets.

    Not --dev-num: the rows that it gave are compared, and -1 is another word for all of them.
    """
    left, right = one.evaluation["protocol"], other.evaluation["protocol"]
    found = [
        f"protocol ({name} {left.get(name)} and {right.get(name)})"
        for name in sorted((left.keys() | right.keys()) - {"dev_num"})
        if left.get(name) != right.get(name)
    ]
    if one.evaluation["seeds"] != other.evaluation["seeds"]:
        found.append(f"seeds ({one.evaluation['seeds']} and {other.evaluation['seeds']})")
    for name in sorted(one.sets.keys() | other.sets.keys()):
        if not (name in one.sets and name in other.sets):
            found.append(f"test sets ({name} in one alone)")
        elif one.sets[name]["sha256"] != other.sets[name]["sha256"]:
            found.append(f"test sets ({name} is not the same file)")
        elif (rows := one.rows(name)) != (others := other.rows(name)):
            found.append(f"test sets ({name}: {rows} and {others} rows)")
    return found


def unlike_exposure(results: list[Result]) -> list[tuple[Result, Result, str]]:
    """Where exposure bias on one set was measured differently: the first that has the set, another, what differs."""
    found = []
    for name in dict.fromkeys(name for result in results for name in result.exposure):
        first, *others = (result for result in results if name in result.exposure)
        left = _terms(first.exposure[name])
        for other in others:
            right = _terms(other.exposure[name])
            differences = [
                key if key in ("teacher", "test file") else f"{key} ({left[key]} and {right[key]})"
                for key in left
                if key in right and left[key] != right[key]
            ]
            if differences:
                found.append((first, other, ", ".join(differences) + (f" on {name}" if name else "")))
    return found


def _terms(curves: dict[str, Any]) -> dict[str, Any]:
    """What has to agree between curves of one set, as far as the file says. Not the teacher's prompt: it is a method's
    own."""
    terms = {key: value for key, value in curves.get("protocol", {}).items() if key != "dev_num"}  # see `unlike`
    terms |= {key: curves[key] for key in ("rows", "seeds") if key in curves}
    if "sha256" in curves:
        terms["test file"] = curves["sha256"]
    if teacher := curves.get("teacher"):
        terms["teacher"] = teacher.get("fingerprint") or teacher["path"]
    return terms


def _read_evaluation(path: Path) -> dict[str, Any]:
    remedy = f"evaluate.py --save {path.parent} writes it"
    found = _read_json(path, EVALUATION, remedy)
    if not found["seeds"] or not found["sets"]:
        raise UserError(f"{path}: it has no seeds or no test sets: {remedy}")
    found["protocol"].setdefault("rouge_tokenizer", "published")  # evaluations made before there was a choice
    for name, entry in found["sets"].items():
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise UserError(f"{path}: {name!r} is no name of a test set: {remedy}")
        if len({len(rows) for rows in entry["rougeL_rows"]}) != 1:
            raise UserError(f"{path}, {name}: its seeds have different numbers of rows: {remedy}")
    return found


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = read_metrics(path)
    if not rows:
        raise UserError(f"{path}: it holds no rows: repeat the run")
    return rows


def _read_exposure(folder: Path) -> dict[str, dict[str, Any]]:
    """Set -> curves, of evaluate.py --type exposure_bias into <folder>/exposure_bias: one file, or one for each set."""
    found, inside = {}, folder / "exposure_bias"
    for path in sorted([inside / CURVE, *inside.glob(f"*/{CURVE}")]):
        if not path.is_file():
            continue
        curves = _read_json(path, CURVES, f"evaluate.py --type exposure_bias --save {inside} writes it")
        drawn = {key: curves[key] for key in (*CURVE_KEYS, *INTERVAL_KEYS) if key in curves}
        if not is_kind(drawn, {key: [(float, None)] for key in drawn}) or len(set(map(len, drawn.values()))) > 1:
            raise UserError(f"{path}: it needs lists {', '.join(CURVE_KEYS)} of one length: measure anew")
        if not is_kind(curves, {key: kind for key, kind in MEASURED.items() if key in curves}):
            raise UserError(f"{path}: its {', '.join(MEASURED)} are not what evaluate.py writes: measure anew")
        name = curves.get("set", "" if path.parent == inside else path.parent.name)
        if name in found or (name and not SET_NAME.fullmatch(name)):
            raise UserError(f"{path}: its set {name!r} has another file or no fit name: remove it, or measure anew")
        found[name] = curves
    return found


def _read_json(path: Path, kind: dict, remedy: str) -> dict[str, Any]:
    content = read_object(path, remedy)
    try:
        check_kind(content, kind, path.name)
    except ValueError as error:
        raise UserError(f"{path}: {error}: {remedy}") from None
    return content
