"""Report a run to experiment trackers: TensorBoard, Weights & Biases, Trackio and MLflow.

They get the numbers of metrics.jsonl, which stays the record of the run. An event is a group of scalars, as "train/lr".
The first rank reports. A tracker that fails during the run is dropped with a warning, and the run continues.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptkd.errors import UserError
from promptkd.utils.jsonl import read_metrics
from promptkd.utils.tables import Cell, Table, evaluation_table

PROJECT, RESULTS, TAG = "promptkd", "evaluations", "promptkd_run"


@dataclass(frozen=True)
class Tracker:
    """A started tracker. Its functions may raise any exception."""

    log: Callable[[dict[str, float], int], Any]  # values and their step
    close: Callable[[Table | None], Any]  # gets the evaluations of a completed run, None of an interrupted one


def tensorboard(run: Trackers) -> Tracker:
    """Write event files to <save>/tensorboard. A resumed run hides the steps that it repeats."""
    from torch.utils.tensorboard import SummaryWriter

    writers: list[SummaryWriter] = []  # made by the first row: until then the folder may be of a run that is replaced

    def writer(step: int | None = None) -> SummaryWriter:
        if not writers:
            writers.append(SummaryWriter(str(run.folder / "tensorboard"), purge_step=step))
            options = [[Cell(name), Cell(str(value))] for name, value in run.settings.items()]
            writers[0].add_text("settings", Table(["option", "value"], options, texts=2).markdown())
        return writers[0]

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer(step).add_scalar(name, value, step)
        writer(step).flush()  # A killed run then loses no row that metrics.jsonl has.

    def close(results: Table | None) -> None:
        if results is not None:
            writer().add_text(RESULTS, results.markdown())
        for each in writers:
            each.close()

    return Tracker(log, close)


def wandb(run: Trackers) -> Tracker:
    """Log to Weights & Biases. WANDB_MODE=offline and other variables apply."""
    import wandb

    project, name = os.environ.get("WANDB_PROJECT", PROJECT), os.environ.get("WANDB_NAME", run.folder.name)
    its_run = wandb.init(project=project, name=name, id=run.run_id, resume="allow", config=run.settings)

    def log(values: dict[str, float], step: int) -> None:
        if step >= its_run.starting_step:  # W&B has the earlier steps, and would warn at each of them.
            its_run.log(values, step=step)

    def close(results: Table | None) -> None:
        if results is not None:
            its_run.log({RESULTS: wandb.Table(columns=[*results.heads], data=results.texts_of_rows())})
        its_run.finish(exit_code=int(results is None))

    return Tracker(log, close)


def trackio(run: Trackers) -> Tracker:
    """Log to Trackio, which stores runs on this machine. TRACKIO_SPACE_ID and other variables apply."""
    import trackio

    trackio.init(project=PROJECT, name=f"{run.folder.name}-{run.run_id}", config=run.settings, resume="allow")

    def close(results: Table | None) -> None:
        if results is not None:
            trackio.log({RESULTS: trackio.Table(columns=results.heads, data=results.texts_of_rows())})
        trackio.finish()

    return Tracker(trackio.log, close)


def mlflow(run: Trackers) -> Tracker:
    """Log to MLflow. MLFLOW_TRACKING_URI and other variables apply."""
    import mlflow

    if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
        mlflow.set_experiment(PROJECT)
    if started := mlflow.search_runs(filter_string=f"tags.{TAG} = '{run.run_id}'", output_format="list"):
        mlflow.start_run(run_id=started[0].info.run_id)
    else:
        mlflow.start_run(run_name=run.folder.name, tags={TAG: run.run_id})
        mlflow.log_params(run.settings)

    def close(results: Table | None) -> None:
        if results is not None:
            mlflow.log_text(results.markdown(), f"{RESULTS}.md")
        mlflow.end_run("FAILED" if results is None else "FINISHED")

    return Tracker(mlflow.log_metrics, close)


STARTERS = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio, "mlflow": mlflow}


class Trackers:
    """The trackers of a run.

    Args:
        resumed: state.json of the checkpoint that the run resumes from.

    Attributes:
        run_id: What the trackers know the run by. Checkpoints keep it.
        folder: The run's folder.
        settings: All options by name.
    """

    def __init__(self, resumed: dict[str, Any] | None = None) -> None:
        self.active: dict[str, Tracker] = {}
        self.run_id = (resumed or {}).get("run_id") or uuid.uuid4().hex[:8]

    def start(self, names: list[str] | None, folder: Path, settings: dict[str, Any]) -> None:
        """Start the trackers with these names. Raise UserError if one does not start."""
        self.folder, self.settings = folder, settings
        for name in dict.fromkeys(names or ()):
            try:
                self.active[name] = STARTERS[name](self)
            except Exception as error:  # Each library has its own types.
                self.close()
                raise UserError(f"--report-to {name} does not start ({_reason(error)}): correct its settings") from None

    def log(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Report the numbers of a row of metrics.jsonl."""
        numbers = {f"{event}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        self._each(lambda tracker: tracker.log(numbers, step))

    def close(self, metrics: Path | None = None) -> None:
        """Close the trackers that are not closed yet.

        Args:
            metrics: metrics.jsonl of a completed run, from which the trackers get the table of its evaluations.
        """
        results = evaluation_table(read_metrics(metrics)) if metrics and self.active else None
        self._each(lambda tracker: tracker.close(results))
        self.active = {}

    def _each(self, action: Callable[[Tracker], Any]) -> None:
        for name, tracker in list(self.active.items()):
            try:
                action(tracker)
            except Exception as error:  # Each library has its own types.
                del self.active[name]
                note = "it gets no more rows, metrics.jsonl has all, and the run continues"
                print(f"train.py: warning: {name} failed ({_reason(error)}): {note}", file=sys.stderr, flush=True)


def check_packages(names: list[str] | None) -> None:
    """Raise UserError if the package of a tracker is missing."""
    for name in names or ():
        if getattr(importlib.util.find_spec(name), "origin", None) is None:  # a folder of that name is no package
            remedy = f"bash install.sh --extras {name}, or pip install {name}"
            raise UserError(f"--report-to {name} needs the package {name}: {remedy}")


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
