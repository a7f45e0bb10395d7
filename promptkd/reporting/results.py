"""Read what train.py and evaluate.py wrote to a result folder, and check which results can be compared."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from promptkd.data.row_files import digest_of_rows, is_data_set
from promptkd.errors import UserError
from promptkd.evaluation.test_sets import SET_NAME
from promptkd.utils.jsonl import read_jsonl, read_metrics
from promptkd.utils.strict_json import check_kind, is_kind, read_object

METHOD_LABELS = {
    "sft": "SFT", "kd": "KD", "seqkd": "SeqKD", "gkd": "GKD", "imitkd": "ImitKD", "distillm": "DistiLLM",
    "distillm2": "DistiLLM-2", "abkd": "ABKD", "minillm": "MiniLLM", "promptkd": "PromptKD",
}  # fmt: skip
RESULTS, CURVE = "results.json", "exposure_bias.json"
CURVE_KEYS = ("ex_acc_err", "mean_R", "mean_eps", "std_R", "std_eps")
INTERVAL_KEYS = ("ex_acc_err_low", "ex_acc_err_high")  # missing in files of the published code
CURVES = {key: [(float, None)] for key in CURVE_KEYS}
MEASURED = {  # how the curves were measured, which files of the published code do not say
    "set": str, "sha256": str, "rows": int, "seeds": [int], "protocol": {...: object}, "teacher": {"path": str},
}  # fmt: skip
SPREAD = {"mean": float, "std": (float, None)}
METRICS = {...: {"value": (float, None), "low": (float, None), "high": (float, None)}}  # not in earlier results
SET = {"file": str, "sha256": str, "rougeL": SPREAD, "exact_match": SPREAD, "rougeL_rows": [[float]]}
EVALUATION = {"model": {"path": str}, "protocol": {...: object}, "seeds": [int], "sets": {...: SET}}
MEMORY = {"peak_memory_gb": [float]}
CONFIG = {"settings": {...: object}, "commit": (str, None), "python": str, "versions": {...: str}}


@dataclass(frozen=True)
class Result:
    """An evaluated model and, if it was trained here, its run."""

    name: str
    folder: Path  # as the user named it
    answers_folder: Path  # with results.json and the answers
    evaluation: dict[str, Any]  # content of results.json
    metrics: list[dict[str, Any]] = field(default_factory=list)  # lines of metrics.jsonl, empty without a run
    config: dict[str, Any] = field(default_factory=dict)  # content of config.json, empty without a run
    exposure: dict[str, dict[str, Any]] = field(default_factory=dict)  # set, "" if unnamed -> exposure_bias.json
    memory: list[float] = field(default_factory=list)  # the ranks' peaks in GB, empty before a run's end

    @property
    def label(self) -> str:
        """The name for tables, spelled as in the paper if it is a method's name."""
        return METHOD_LABELS.get(self.name, self.name)

    @property
    def sets(self) -> dict[str, Any]:
        return self.evaluation["sets"]

    def series(self, key: str, event: str = "train") -> tuple[list[int], list[float]]:
        """Return the steps and values of a metric, both empty if the run has none. Of a list, the last value counts."""
        points = [(line["step"], line[key]) for line in self.metrics if line["event"] == event and key in line]
        steps = [step for step, _ in points]
        values = [value[-1] if isinstance(value, list) else value for _, value in points]
        for value in values:
            if not is_kind(value, (float, None)):
                raise UserError(f"{self.folder}/metrics.jsonl: {key} is {value!r}, not a number: repeat the run")
        return steps, values

    def score(self, name: str, measure: str = "rougeL") -> dict[str, Any] | None:
        """Return a set's per_seed, mean and std (None for a single seed), or None if the result lacks the set."""
        return self.sets[name][measure] if name in self.sets else None

    def examples(self, name: str) -> int:
        """Return the number of examples of a set that were answered."""
        return len(self.sets[name]["rougeL_rows"][0])

    def answers(self, name: str) -> list[str]:
        """Read the answers to a set with the first seed."""
        rows = read_answers(self.answers_folder / name, self.evaluation["seeds"][0], self.examples(name))
        return [row["answer"] for row in rows]


def read_result(argument: str) -> Result:
    """Read FOLDER or NAME=FOLDER: what train.py --save wrote, with an evaluation in "eval", or evaluate.py's --save.

    For a folder with an evaluation only, the run is expected around the evaluated model. The exposure bias is that of
    the folder, or else that of the run.

    Raises:
        UserError: If a file is missing or broken. The message says which command writes it.
    """
    named = re.match(r"([^/=]+)=", argument)
    folder = Path(argument[named.end() :] if named else argument)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: name folders that train.py or evaluate.py --save has written")
    only_evaluation = (folder / RESULTS).is_file() and not (folder / "metrics.jsonl").is_file()
    answers_folder = folder if only_evaluation else folder / "eval"
    evaluation = read_evaluation(answers_folder / RESULTS)
    run = Path(evaluation["model"]["path"]).parent if only_evaluation else folder
    metrics, memory = run / "metrics.jsonl", run / "memory.json"
    exposure = _read_exposure(folder)
    name = named[1] if named else folder.name
    if not metrics.exists():  # The model was not trained here. Curves around it may belong to another model.
        return Result(name, folder, answers_folder, evaluation, exposure=exposure)
    lines, remedy = read_metrics(metrics), f"train.py --save {run} writes it"
    if not lines:
        raise UserError(f"{metrics}: it is empty: repeat the run")
    config = read_json(run / "config.json", CONFIG, remedy)
    peaks = read_json(memory, MEMORY, remedy)["peak_memory_gb"] if memory.is_file() else []
    return Result(name, folder, answers_folder, evaluation, lines, config, exposure or _read_exposure(run), peaks)


def check_comparable(results: list[Result], mixed: bool = False) -> None:
    """Check that a table of the results does not mislead.

    Args:
        results: All results of a report.
        mixed: Allow different protocols, seeds and test sets, but no equal names.

    Raises:
        UserError: If two results have one name, or were evaluated or measured differently.
    """
    names = [result.name for result in results]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two results are called {twice}, which names their table rows: write NAME=FOLDER for one")
    if mixed:
        return
    for other in results[1:]:
        if differences := protocol_differences(results[0], other):
            raise UserError(
                f"{results[0].folder} and {other.folder} were evaluated with different {', '.join(differences)}: "
                "evaluate one of them again, or pass --mixed to compare them anyway"
            )
    for first, other, difference in exposure_differences(results):
        raise UserError(
            f"exposure bias of {first.folder} and of {other.folder} was measured with different {difference}: "
            "measure one of them again, or pass --mixed to compare them anyway"
        )


def protocol_differences(first: Result, other: Result) -> list[str]:
    """List how two evaluations differ: options of the protocol with both values, seeds, test sets.

    --dev-num is left out. The numbers of answered examples are compared instead, because -1 means all examples.
    """
    left, right = first.evaluation["protocol"], other.evaluation["protocol"]
    differences = [
        f"protocol ({name} {left.get(name)} and {right.get(name)})"
        for name in sorted((left.keys() | right.keys()) - {"dev_num"})
        if left.get(name) != right.get(name)
    ]
    if first.evaluation["seeds"] != other.evaluation["seeds"]:
        differences.append(f"seeds ({first.evaluation['seeds']} and {other.evaluation['seeds']})")
    for name in sorted(first.sets.keys() | other.sets.keys()):
        if not (name in first.sets and name in other.sets):
            differences.append(f"test sets ({name} in one only)")
        elif first.sets[name]["sha256"] != other.sets[name]["sha256"]:
            differences.append(f"test sets ({name} is not the same file)")
        elif first.examples(name) != other.examples(name):
            differences.append(f"test sets ({name}: {first.examples(name)} and {other.examples(name)} rows)")
    return differences


def exposure_differences(results: list[Result]) -> list[tuple[Result, Result, str]]:
    """List where the exposure bias on one set was measured differently.

    Returns:
        (first result with the set, other result, how the measurements differ).
    """
    differing = []
    for name in dict.fromkeys(name for result in results for name in result.exposure):
        first, *others = (result for result in results if name in result.exposure)
        left = _measurement(first.exposure[name])
        for other in others:
            right = _measurement(other.exposure[name])
            differences = [
                key if key in ("teacher", "test file") else f"{key} ({left[key]} and {right[key]})"
                for key in left
                if key in right and left[key] != right[key]
            ]
            if differences:
                differing.append((first, other, ", ".join(differences) + (f" on {name}" if name else "")))
    return differing


def _measurement(curves: dict[str, Any]) -> dict[str, Any]:
    """Return what has to agree between curves of one set. The teacher's prompt may differ: it belongs to a method."""
    terms = {key: value for key, value in curves.get("protocol", {}).items() if key != "dev_num"}
    terms |= {key: curves[key] for key in ("rows", "seeds") if key in curves}
    if "sha256" in curves:
        terms["test file"] = curves["sha256"]
    if teacher := curves.get("teacher"):
        terms["teacher"] = teacher.get("fingerprint") or teacher["path"]
    return terms


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read results.json of evaluate.py. Raise UserError where it is missing or broken."""
    remedy = f"evaluate.py --save {path.parent} writes it"
    evaluation = read_json(path, EVALUATION, remedy)
    if not evaluation["seeds"] or not evaluation["sets"]:
        raise UserError(f"{path}: it has no seeds or no test sets: {remedy}")
    evaluation["protocol"].setdefault("rouge_tokenizer", "published")  # evaluations from before there was a choice
    for name, entry in evaluation["sets"].items():
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise UserError(f"{path}: {name!r} is not a name of a test set: {remedy}")
        if len({len(scores) for scores in entry["rougeL_rows"]}) != 1:
            raise UserError(f"{path}, {name}: its seeds have different numbers of rows: {remedy}")
        if not is_kind(entry.get("metrics", {}), METRICS):
            raise UserError(f"{path}, {name}: its metrics are not numbers with intervals: {remedy}")
    return evaluation


def read_answers(folder: Path, seed: int, examples: int) -> list[dict[str, Any]]:
    """Read the rows of a set's answers with a seed. Raise UserError where some are missing or in another order."""
    file = folder / f"seed{seed}" / "answers.jsonl"
    rows = read_jsonl(file)
    in_order = all(row.get("index", place) == place for place, row in enumerate(rows))
    if not (in_order and len(rows) == examples and is_kind(rows, [{"answer": str}])):
        raise UserError(f"{file}: not the answers of evaluate.py to all {examples} examples in order: evaluate again")
    return rows


def is_unchanged(entry: dict[str, Any]) -> bool:
    """Return whether the rows of a test set are still those that were evaluated, in a file or a data set."""
    source = entry["file"]
    try:
        return (is_data_set(source) or Path(source).is_file()) and digest_of_rows(source) == entry["sha256"]
    except (OSError, UserError):
        return False


def _read_exposure(folder: Path) -> dict[str, dict[str, Any]]:
    """Read what evaluate.py --type exposure_bias wrote to <folder>/exposure_bias: one file, or one for each set."""
    exposure: dict[str, dict[str, Any]] = {}
    inside = folder / "exposure_bias"
    for path in filter(Path.is_file, sorted([inside / CURVE, *inside.glob(f"*/{CURVE}")])):
        curves = read_json(path, CURVES, f"evaluate.py --type exposure_bias --save {inside} writes it")
        drawn = {key: curves[key] for key in (*CURVE_KEYS, *INTERVAL_KEYS) if key in curves}
        if not is_kind(drawn, {key: [(float, None)] for key in drawn}) or len(set(map(len, drawn.values()))) > 1:
            raise UserError(f"{path}: it needs lists {', '.join(CURVE_KEYS)} of one length: measure again")
        if not is_kind(curves, {key: kind for key, kind in MEASURED.items() if key in curves}):
            raise UserError(f"{path}: its {', '.join(MEASURED)} are not what evaluate.py writes: measure again")
        name = curves.get("set", "" if path.parent == inside else path.parent.name)
        if name in exposure or (name and not SET_NAME.fullmatch(name)):
            raise UserError(f"{path}: its set {name!r} has another file or an invalid name: remove it or measure again")
        exposure[name] = curves
    return exposure


def read_json(path: Path, kind: dict[Any, Any], remedy: str) -> dict[str, Any]:
    """Read a JSON object of a kind (see `check_kind`). Raise UserError where it is missing or another one."""
    content = read_object(path, remedy)
    try:
        check_kind(content, kind, path.name)
    except ValueError as error:
        raise UserError(f"{path}: {error}: {remedy}") from None
    return content
