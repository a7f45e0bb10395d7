"""Losses and gradients that are not finite: drop a few such updates, or end the run with a record."""

from __future__ import annotations

import math
from pathlib import Path

from promptkd.distributed.ranks import Ranks
from promptkd.engine.engine import TrainEngine
from promptkd.errors import RunError
from promptkd.methods.context import StepBatch
from promptkd.utils.files import write_json


class NonFiniteGuard:
    """Check the values that the log holds anyway, so that it adds no wait for the device.

    Losses and norms are sums over ranks, so all ranks decide alike. A gradient that overflows fp16 is normal while the
    loss scale can adapt, and the metrics count it. At the smallest scale it ends the run.

    Args:
        method: The method's name, for messages.
        learners: The engines by name.
        allowed: How many updates may be dropped.
        skipped: How many were dropped before the run was resumed.
    """

    def __init__(self, method: str, learners: dict[str, TrainEngine], allowed: int, skipped: int) -> None:
        self.method, self.learners, self.allowed, self.skipped = method, learners, allowed, skipped
        for learner in learners.values() if allowed else ():
            learner.drop_nonfinite()  # costs time; without an allowance the run ends and keeps no weights

    def find(self, row: dict[str, float]) -> dict[str, float]:
        """Return the entries of a log row, and gradient norms by learner, that are not finite."""
        nonfinite = {key: value for key, value in row.items() if not math.isfinite(value) and not key.endswith("_norm")}
        for name, learner in self.learners.items():
            norm = learner.grad_norm
            adapts = learner.loss_scale is not None and learner.loss_scale.is_dynamic
            if not (math.isfinite(norm) and norm >= 0) and not adapts:
                nonfinite[f"{name} gradient"] = norm
        return nonfinite

    def loss_scales(self, step: int) -> dict[str, float]:
        """Return the loss scales of fp16 engines for the log. Keys of the prompt's engine begin with `prompt_`.

        Raises:
            RunError: Gradients overflow at the smallest loss scale.
        """
        row: dict[str, float] = {}
        for name, learner in self.learners.items():
            if (scale := learner.loss_scale) is None:
                continue
            values = scale.row()
            if scale.is_exhausted:
                raise RunError(
                    f"{self.method}, step {step}: gradients of the {name} overflow fp16 at the "
                    f"smallest loss scale, {values['loss_scale']:.0f}: name a bf16 or fp32 file as --deepspeed_config"
                )
            prefix = "" if name == "student" else f"{name}_"
            row |= {f"{prefix}{key}": value for key, value in values.items()}
        return row

    def report(self, step: int, nonfinite: dict[str, float], batch: StepBatch, ranks: Ranks, folder: Path) -> None:
        """Save the step's examples to a file.

        Raises:
            RunError: --skip-nonfinite does not allow one more.
        """
        examples = ranks.all_gather_objects(
            [
                {"index": int(e.index), "prompt": e.prompt.tolist(), "response": e.response.tolist()}
                for e in batch.examples
            ]
        )
        path = folder / f"nonfinite-step-{step}.json"
        values = {key: str(value) for key, value in nonfinite.items()}
        if ranks.is_main:
            content = {"step": step, "method": self.method, "values": values, "examples": examples}
            write_json(path, content)
        self.skipped += 1
        if self.skipped > self.allowed:
            ids = ", ".join(str(example["index"]) for example in examples[:64])
            raise RunError(
                f"{self.method}, step {step}: not finite: {', '.join(f'{k} ({v})' for k, v in values.items())}; "
                f"training examples {ids}; saved in {path} (--skip-nonfinite N drops N such updates)"
            )
