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
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from promptkd.errors import UserError
from promptkd.utils.jsonl import read_metrics
from promptkd.utils.tables import Table, evaluation_table

PROJECT, RESULTS, TAG = "promptkd", "evaluations", "promptkd_run"


class Tracker(Protocol):
    """A tracker of one run. Any method may raise any exception.

    Args:
        folder: The run's folder.
        run_id: A text that stays the same when the run resumes.
        step: The step after which the run resumes. None for a new run.
        settings: All options by name.
    """

    def __init__(self, folder: Path, run_id: str, step: int | None, settings: dict[str, Any]) -> None: ...

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self, results: Table | None) -> None:
        """End the run. `results` are the evaluations of a completed run, and None for an interrupted one."""


class TensorBoardTracker:
    """Write event files to <save>/tensorboard. A resumed run hides the steps that it repeats."""

    def __init__(self, folder: Path, run_id: str, step: int | None, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.start = lambda: SummaryWriter(str(folder / "tensorboard"), purge_step=None if step is None else step + 1)
        self.settings = Table(["option", "value"], texts=2)
        for name, value in settings.items():
            self.settings.add(name, str(value))

    @cached_property
    def writer(self) -> Any:
        """The writer. It starts with the first row, since until then the folder may hold a run that is replaced."""
        writer = self.start()
        writer.add_text("settings", self.settings.markdown())
        return writer

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # A killed run then loses no row that metrics.jsonl has.

    def close(self, results: Table | None) -> None:
        if results is not None:
            self.writer.add_text(RESULTS, results.markdown())
        self.writer.close()


class WandbTracker:
    """Log to Weights & Biases. WANDB_MODE=offline and other variables apply."""

    def __init__(self, folder: Path, run_id: str, step: int | None, settings: dict[str, Any]) -> None:
        import wandb

        self.wandb, project = wandb, os.environ.get("WANDB_PROJECT", PROJECT)
        name = os.environ.get("WANDB_NAME", folder.name)
        self.run = wandb.init(project=project, name=name, id=run_id, resume="allow", config=settings)

    def log(self, step: int, values: dict[str, float]) -> None:
        if step >= self.run.starting_step:  # W&B has the earlier steps, and would warn at each of them.
            self.run.log(values, step=step)

    def close(self, results: Table | None) -> None:
        if results is not None:
            self.run.log({RESULTS: self.wandb.Table(columns=results.heads, data=_texts(results))})
        self.run.finish(exit_code=int(results is None))


class TrackioTracker:
    """Log to Trackio, which stores runs on this machine. TRACKIO_SPACE_ID and other variables apply."""

    def __init__(self, folder: Path, run_id: str, step: int | None, settings: dict[str, Any]) -> None:
        import trackio

        self.trackio = trackio
        trackio.init(project=PROJECT, name=f"{folder.name}-{run_id}", config=settings, resume="allow")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.trackio.log(values, step=step)

    def close(self, results: Table | None) -> None:
        if results is not None:
            self.trackio.log({RESULTS: self.trackio.Table(columns=results.heads, data=_texts(results))})
        self.trackio.finish()


class MlflowTracker:
    """Log to MLflow. MLFLOW_TRACKING_URI and other variables apply."""

    def __init__(self, folder: Path, run_id: str, step: int | None, settings: dict[str, Any]) -> None:
        import mlflow

        self.mlflow = mlflow
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            mlflow.set_experiment(PROJECT)
        if started := mlflow.search_runs(filter_string=f"tags.{TAG} = '{run_id}'", output_format="list"):
            mlflow.start_run(run_id=started[0].info.run_id)
        else:
            mlflow.start_run(run_name=folder.name, tags={TAG: run_id})
            mlflow.log_params(settings)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.mlflow.log_metrics(values, step=step)

    def close(self, results: Table | None) -> None:
        if results is not None:
            self.mlflow.log_text(results.markdown(), f"{RESULTS}.md")
        self.mlflow.end_run("FAILED" if results is None else "FINISHED")


KINDS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoardTracker, "wandb": WandbTracker, "trackio": TrackioTracker, "mlflow": MlflowTracker,
}  # fmt: skip


class Trackers:
    """The trackers of a run.

    Args:
        resumed: state.json of the checkpoint that the run resumes from.

    Attributes:
        active: The started trackers by name.
        run_id: The run's id, which checkpoints keep.
    """

    def __init__(self, resumed: dict[str, Any] | None = None) -> None:
        self.active: dict[str, Tracker] = {}
        self.step = resumed["step"] if resumed else None
        recorded = (resumed or {}).get("run_id")
        self.run_id = recorded if isinstance(recorded, str) else uuid.uuid4().hex[:8]

    def start(self, names: list[str] | None, folder: Path, settings: dict[str, Any]) -> None:
        """Start trackers.

        Args:
            names: Keys of `KINDS`.
            folder: The run's folder.
            settings: All options by name.

        Raises:
            UserError: A tracker does not start. Those before it are closed.
        """
        for name in dict.fromkeys(names or ()):
            try:
                self.active[name] = KINDS[name](folder, self.run_id, self.step, settings)
            except Exception as error:  # Each library has its own types.
                self.close(None)
                raise UserError(f"--report-to {name} does not start ({_reason(error)}): correct its settings") from None

    def log(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Report the numbers of a row of metrics.jsonl."""
        numbers = {f"{event}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        self._each(lambda tracker: tracker.log(step, numbers))

    def finish(self, metrics: Path) -> None:
        """End a completed run in all trackers, with the table of its evaluations."""
        if self.active:
            self.close(evaluation_table(read_metrics(metrics)))

    def close(self, results: Table | None) -> None:
        """End the run in all trackers, see `Tracker.close`. Do nothing if they are closed."""
        self._each(lambda tracker: tracker.close(results))
        self.active = {}

    def _each(self, action: Callable[[Tracker], None]) -> None:
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
        if importlib.util.find_spec(name) is None:
            remedy = f"bash install.sh --extras {name}, or pip install {name}"
            raise UserError(f"--report-to {name} needs the package {name}: {remedy}")


def _texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
