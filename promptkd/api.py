"""Train and evaluate from Python, with the options and the checks of the command line."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from promptkd.cli.evaluate import read_settings, run_evaluation
from promptkd.cli.train import push_run, resolve
from promptkd.config.option_file import as_arguments
from promptkd.distributed.process_state import restored_process_state
from promptkd.errors import RunError, UserError
from promptkd.evaluation.session import RESULTS
from promptkd.models.prompted import load_prompted_teacher
from promptkd.training.run_folder import BEST_METRICS, best_model
from promptkd.training.setup import build_trainer
from promptkd.training.signals import STATUS
from promptkd.utils.jsonl import read_metrics
from promptkd.utils.strict_json import read_object

__all__ = ["Results", "Run", "evaluate", "load_prompted_teacher", "train"]
Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: The run's folder, `save`.
        settings: All options by name.
        metrics: The rows of metrics.jsonl. Each has an `event` and a `step`.
        best: The dev score of each saved best model by its folder, such as `best_rougeL`.
    """

    folder: Path
    settings: dict[str, Any] = field(repr=False)
    metrics: list[dict[str, Any]] = field(repr=False)
    best: dict[str, float]

    @property
    def student(self) -> Path:
        """The folder of the best student: by ROUGE-L, else by dev loss, else the last one."""
        return best_model(self.folder)

    @property
    def prompt(self) -> Path | None:
        """The folder of the last soft prompt, or None if the method tunes none."""
        folder = self.folder / "prompt"
        return folder if folder.is_dir() else None

    @property
    def curves(self) -> Path:
        """The picture of the run's metrics."""
        return self.folder / "curves.png"


@dataclass(frozen=True)
class Results:
    """A finished evaluation.

    Attributes:
        folder: The folder of results, `save` or `answers`.
        sets: The values of each test set by its name, as in results.json.
        text: The results as a Markdown table.
    """

    folder: Path
    sets: dict[str, dict[str, Any]] = field(repr=False)
    text: str = field(repr=False)


@restored_process_state()
def train(**options: Any) -> Run:
    """Train a student.

    Args:
        **options: The options of `promptkd train` with underscores, such as `method="promptkd"` and `batch_size=8`.
            Switches are True or False, and None leaves an option at its default. Paths may be `Path` objects.

    Raises:
        UserError: An option is unknown, and the message names the nearest one. Or an input cannot be used.
        RunError: The run cannot continue, or a signal has stopped it.
        KeyboardInterrupt: The run was interrupted. It wrote a checkpoint, from which `resume="must"` continues.
    """
    config = _parsed(resolve, options, "train()")
    trainer = build_trainer(config)
    trainer.signals.second_interrupt = signal.default_int_handler  # the kernel of a notebook must survive it
    try:
        trainer.fit()
    except SystemExit as stop:
        kind = KeyboardInterrupt if stop.code == STATUS[signal.SIGINT] else RunError
        raise kind("a signal has stopped the run after a step: resume='must' continues") from None
    push_run(trainer, config)
    best = {name: trainer.best[name] for name in BEST_METRICS if name in trainer.best}
    return Run(trainer.folder, config.as_dict(), read_metrics(trainer.metrics.path), best)


@restored_process_state()
def evaluate(**options: Any) -> Results:
    """Answer test sets with a model and score the answers, or measure exposure bias.

    Args:
        **options: The options of `promptkd evaluate`, written as for `train`.

    Raises:
        UserError: As `train`.
        RunError: As `train`.
    """
    settings = _parsed(read_settings, options, "evaluate()")
    run_evaluation(settings)
    folder = Path(settings.evaluation.answers or settings.evaluation.save)
    results = read_object(folder / RESULTS, "evaluate again")
    return Results(folder, results["sets"], (folder / "results.md").read_text(encoding="utf-8"))


def _parsed(parse: Callable[[list[str]], Parsed], options: dict[str, Any], source: str) -> Parsed:
    """Parse keyword arguments as the command line parses its arguments."""
    try:
        return parse(as_arguments(options, source))
    except SystemExit:
        raise UserError("help and dry_run end the process, which is for the command line: leave them out") from None
