"""A run of a study, and what was chosen for a method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from promptkd.study.declaration import Options, Study


class Choice(NamedTuple):
    """What was chosen for a method on the dev set with one seed."""

    rate: float
    options: Options
    score: float
    bracketed: bool  # whether the best rate lies between two others


@dataclass(frozen=True)
class Run:
    """A student to train.

    Attributes:
        stage: "timing", "rates" or the name of an experiment.
        label: What distinguishes it from other runs of its stage, pair and method.
        settings: All options of train.py but --save and --resume.
        evaluated: Whether it is evaluated on the test sets.
    """

    stage: str
    pair: str
    method: str
    label: str
    settings: Options = field(hash=False)
    evaluated: bool = False

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.pair}/{self.method}/{self.label}"

    @property
    def steps(self) -> int:
        return int(self.settings["total_iters"])


def evaluations_of(run: Run, study: Study) -> dict[str, Options]:
    """Return the folders of a run's evaluations, the main one first, and by which options each differs from it."""
    also = {f"eval-{name}": options for name, options in study.evaluate_also.items()}
    return {"eval": {}, **also} if run.evaluated else {}


def is_evaluation(name: str) -> bool:
    """Whether a stage of that name evaluates a run. Its name is that of the run and then its folder."""
    return name.count("/") > 3
