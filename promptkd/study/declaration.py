"""Read the YAML file that declares a study, and check it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptkd.config.option_file import as_arguments, read_yaml
from promptkd.errors import UserError
from promptkd.utils.strict_json import check_kind

Options = dict[str, Any]
NAME = re.compile(r"[\w.+-]+")
OPTIONS = {...: object}
KINDS: dict[str, Any] = {
    "title": str,
    "reference": str,
    "updates": int,
    "evaluations": int,
    "rates": [float],
    "rate_seed": int,
    "prepare": [OPTIONS],
    "train": OPTIONS,
    "evaluate": OPTIONS,
    "evaluate_also": {...: OPTIONS},
    "pairs": {...: OPTIONS},
    "methods": {...: OPTIONS},
    "experiments": {...: {"methods": (str, [str]), "seeds": [int]}},
}
SETTINGS_OF_METHOD = ("options", "rates", "tune", "like")
SETTINGS_OF_EXPERIMENT = ("methods", "seeds", "pairs", "budget", "options", "evaluate")
STEPS = ("name", "train", "run", "product", "after")
STAGES = ("prepare", "timing", "rates")
BUDGETS = ("updates", "time")
REMEDY = "see scripts/study/small.yaml"


@dataclass(frozen=True)
class StudyMethod:
    """A method of the study.

    Attributes:
        options: Options of train.py, for `like` the changes to that method's.
        rates: Learning rates to try, in ascending order.
        tune: Option -> values to try at the best learning rate.
        like: Name of the method whose chosen rate and options it takes, for ablations. Such a method is not tuned.
    """

    name: str
    options: Options
    rates: tuple[float, ...]
    tune: dict[str, list[Any]]
    like: str | None


@dataclass(frozen=True)
class Experiment:
    """Runs with the chosen settings.

    Attributes:
        methods: Names of the methods.
        seeds: The training seeds.
        pairs: Names of the pairs of student and teacher.
        budget: "updates": as many as the study's. "time": as many as take the reference's seconds.
        options: More options of train.py.
        evaluate: Whether the students are evaluated on the test sets.
    """

    name: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    pairs: tuple[str, ...]
    budget: str = "updates"
    options: Options = dataclasses.field(default_factory=dict)
    evaluate: bool = True


@dataclass(frozen=True)
class Study:
    """A declared study. `{save}` in its texts stands for the output folder.

    Attributes:
        reference: The method that the others are compared with.
        updates: Number of optimizer steps of each run.
        evaluations: Number of evaluations on the dev set in each run.
        rate_seed: The training seed with which rates and options are chosen.
        prepare: Steps that make data and models, in order.
        train, evaluate: Options of all calls of train.py and evaluate.py.
        evaluate_also: Name -> other options of evaluate.py, for a further evaluation of each student.
        pairs: Name -> options of train.py that select student and teacher.
    """

    save: Path
    title: str
    reference: str
    updates: int
    evaluations: int
    rate_seed: int
    prepare: tuple[Options, ...]
    train: Options
    evaluate: Options
    evaluate_also: dict[str, Options]
    pairs: dict[str, Options]
    methods: dict[str, StudyMethod]
    experiments: dict[str, Experiment]

    @property
    def stages(self) -> tuple[str, ...]:
        """Names that --only takes."""
        return (*STAGES, *self.experiments)


def read_study(path: str, save: Path) -> Study:
    """Read a declaration.

    Raises:
        UserError: The file is not YAML, or a key is missing, unknown or of the wrong kind. The message names it.
    """
    content = read_yaml(path, f"study {path}", REMEDY)
    where = f"study {path}"
    if not isinstance(content, dict):
        raise UserError(f"{where}: it holds no keys and values: {REMEDY}")
    _known(content, tuple(KINDS), where)
    content.setdefault("evaluate_also", {})
    try:
        check_kind(content, KINDS, where)
    except ValueError as error:
        raise UserError(f"{error}: {REMEDY}") from None
    content = _fill(content, str(save))
    for key in ("updates", "evaluations"):
        if content[key] < 1:
            raise UserError(f"{where}: {key} is {content[key]}: give at least 1")
    methods = {name: _method(name, value, content, where) for name, value in content["methods"].items()}
    experiments = {name: _experiment(name, value, content, where) for name, value in content["experiments"].items()}
    _check_names([*content["pairs"], *methods, *experiments, *content["evaluate_also"]], where)
    if content["reference"] not in methods:
        raise UserError(f"{where}: reference {content['reference']} is none of the methods: name one of them")
    _check_steps(content["prepare"], f"{where}, prepare")
    shared = {key: content[key] for key in ("title", "reference", "updates", "evaluations", "rate_seed")}
    groups = {key: content[key] for key in ("train", "evaluate", "evaluate_also", "pairs")}
    return Study(save, **shared, **groups, prepare=tuple(content["prepare"]), methods=methods, experiments=experiments)


def _known(content: Options, keys: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in keys:
            raise UserError(f"{where}: unknown key {key!r}: use {', '.join(keys)}")


def _check_steps(steps: list[Options], where: str) -> None:
    names: list[str] = []
    for step in steps:
        _known(step, STEPS, where)
        kinds = {"name": str, **({"train": OPTIONS} if "train" in step else {"run": str, "product": str})}
        try:
            check_kind({"after": [], **step}, {"after": [str], **kinds}, f"{where}, {step.get('name')}")
        except ValueError as error:
            raise UserError(f"{error}: {REMEDY}") from None
        for earlier in step.get("after", ()):
            if earlier not in names:
                raise UserError(f"{where}, {step['name']}: after has {earlier}, which is no earlier step: {REMEDY}")
        names.append(step["name"])
    _check_names(names, where)


def _check_names(names: list[str], where: str) -> None:
    for name in names:
        if not NAME.fullmatch(name):
            raise UserError(f"{where}: {name!r} is not a name: use letters, digits and . + - _")


def _fill(value: Any, save: str) -> Any:
    """Replace `{save}` in all texts."""
    if isinstance(value, str):
        return value.replace("{save}", save)
    if isinstance(value, list):
        return [_fill(item, save) for item in value]
    if isinstance(value, dict):
        return {key: _fill(item, save) for key, item in value.items()}
    return value


def _method(name: str, value: Options, content: Options, where: str) -> StudyMethod:
    where = f"{where}, methods, {name}"
    _known(value, SETTINGS_OF_METHOD, where)
    options, like, tune = value.get("options", {}), value.get("like"), value.get("tune", {})
    rates: Any = value.get("rates", content["rates"])
    kinds = {"options": (options, OPTIONS), "rates": (rates, [float]), "tune": (tune, {...: [object]})}
    try:
        for key, (entry, kind) in kinds.items():
            check_kind(entry, kind, f"{where}, {key}")
        as_arguments(options, where)
    except ValueError as error:
        raise UserError(f"{error}: {REMEDY}") from None
    if like is not None and (like not in content["methods"] or content["methods"][like].get("like")):
        raise UserError(f"{where}: like {like} is none of the tuned methods: name one of them")
    if len(rates) < 3 or min(rates) <= 0 or sorted(set(rates)) != list(rates):
        raise UserError(f"{where}: rates are not at least three ascending positive numbers: {REMEDY}")
    return StudyMethod(name, options, tuple(map(float, rates)), tune, like)


def _experiment(name: str, value: Options, content: Options, where: str) -> Experiment:
    where = f"{where}, experiments, {name}"
    _known(value, SETTINGS_OF_EXPERIMENT, where)
    if name in STAGES:
        raise UserError(f"{where}: {name} is the name of a stage: use another name")
    tuned = [key for key, method in content["methods"].items() if "like" not in method]
    methods = tuned if value["methods"] == "all" else value["methods"]
    pairs = value.get("pairs", list(content["pairs"]))
    for key, names in (("methods", methods), ("pairs", pairs)):
        if not isinstance(names, list) or not names:
            raise UserError(f"{where}: {key} is not a list of names: {REMEDY}")
        for one in names:
            if one not in content[key]:
                raise UserError(f"{where}: {key} has {one}, which is not declared: use {', '.join(content[key])}")
    budget, options, evaluate = value.get("budget", "updates"), value.get("options", {}), value.get("evaluate", True)
    if budget not in BUDGETS:
        raise UserError(f"{where}: budget is {budget}: use {' or '.join(BUDGETS)}")
    if not isinstance(options, dict) or not isinstance(evaluate, bool):
        raise UserError(f"{where}: options are not keys and values, or evaluate is neither true nor false: {REMEDY}")
    if not value["seeds"] or len(set(value["seeds"])) < len(value["seeds"]):
        raise UserError(f"{where}: seeds are empty or occur twice: {REMEDY}")
    return Experiment(name, tuple(methods), tuple(value["seeds"]), tuple(pairs), budget, options, evaluate)
