"""Numbers that went wrong: what, where, with which examples; drop a few such updates, or stop."""

from __future__ import annotations

import math
from pathlib import Path

from promptkd.distributed.ranks import Ranks
from promptkd.engine.engine import TrainEngine
from promptkd.errors import RunError
from promptkd.methods.context import StepBatch
from promptkd.utils.run_files import write_json

PARTS = {"teacher": "prompt"}  # what learns in a learner, where that is not its name


class NonFiniteGuard:
    """Looks at what the log holds anyway, so it costs no wait for the device.

    Losses and norms are sums over ranks: all ranks see the same. A gradient that overflows fp16 is no fault while the
    loss scale can adapt: it is counted in the metrics. At the smallest scale it ends the run.
    """

    def __init__(self, method: str, learners: dict[str, TrainEngine], allowed: int, skipped: int) -> None:
        self.method, self.learners, self.allowed, self.skipped = method, learners, allowed, skipped
        for learner in learners.values() if allowed else ():
            learner.drop_nonfinite()  # at some cost; without allowance the run ends and keeps no weights

    def find(self, row: dict[str, float]) -> dict[str, float]:
        """The log's entries, and gradient norms by part, that are not finite."""
        wrong = {key: value for key, value in row.items() if not math.isfinite(value) and not key.endswith("_norm")}
        for name, learner in self.learners.items():
            norm = learner.grad_norm
            adapts = learner.loss_scale is not None and learner.loss_scale.is_dynamic
            if not (math.isfinite(norm) and norm >= 0) and not adapts:
                wrong[f"{PARTS.get(name, name)} gradient"] = norm
        return wrong

    def loss_scales(self, step: int) -> dict[str, float]:
        """What the metrics hold of the loss scales of fp16 engines; the prompt's keys begin with `prompt_`.

        Raises:
            RunError: Gradients overflow at the smallest loss scale.
        """
        row = {}
        for name, learner in self.learners.items():
            if (scale := learner.loss_scale) is None:
                continue
            values = scale.row()
            if scale.is_exhausted:
                raise RunError(
                    f"{self.method}, step {step}: gradients of the {PARTS.get(name, name)} overflow fp16 at the "
                    f"smallest loss scale, {values['loss_scale']:.0f}: name a bf16 or fp32 file as --deepspeed_config"
                )
            prefix = f"{PARTS[name]}_" if name in PARTS else ""
            row |= {f"{prefix}{key}": value for key, value in values.items()}
        return row

    def report(self, step: int, wrong: dict[str, float], window: StepBatch, ranks: Ranks, folder: Path) -> None:
        """Save the step for study; raise RunError unless --skip-nonfinite allows one more."""
        mine = [
            {"index": int(e.index), "prompt": e.prompt.tolist(), "response": e.response.tolist()}
            for e in window.examples
        ]
        examples = ranks.all_gather_objects(mine)
        path = folder / f"nonfinite-step-{step}.json"
        values = {key: str(value) for key, value in wrong.items()}
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
