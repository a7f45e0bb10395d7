"""The loss scale of an fp16 engine. Overflows lower it and are counted. A non-finite loss is not an overflow."""

from __future__ import annotations

from typing import Any

# The state of DeepSpeed's loss scaler, as checkpoints keep it.
LOSS_SCALE = ("cur_scale", "cur_iter", "cur_hysteresis", "last_overflow_iter")


class LossScale:
    """DeepSpeed's loss scaler of one engine (runtime/fp16/loss_scaler.py).

    A step whose scaled gradients overflow float16 leaves weights, optimizer and schedule as they are. DeepSpeed then
    lowers a dynamic scale, after as many overflows as the file's `hysteresis` says.
    """

    def __init__(self, engine: Any) -> None:
        self.engine, self.scaler = engine, engine.optimizer.loss_scaler
        self.scaler.raise_error_at_min_scale = False  # NonFiniteGuard ends the run instead, with one line
        self.is_exhausted = False
        self.before: dict[str, Any] = {}
        self.skipped, self.adapts = 0, False

    @property
    def is_dynamic(self) -> bool:
        """Whether the scale adapts to overflows. It is False for a fixed `fp16.loss_scale`."""
        return bool(self.scaler.dynamic)

    def row(self) -> dict[str, float]:
        """Return the values of the metrics row: the scale after the step and the number of skipped steps."""
        return {"loss_scale": self.scaler.cur_scale, "skipped_steps": self.engine.skipped_steps}

    def step(self) -> None:
        """Take the engine's optimizer step."""
        scaler = self.scaler
        self.before = {name: getattr(scaler, name) for name in LOSS_SCALE if hasattr(scaler, name)}
        self.skipped = self.engine.skipped_steps
        self.adapts = self.is_dynamic and (scaler.cur_scale > scaler.min_scale or scaler.cur_hysteresis > 1)
        self.engine.step()

    def settle(self, is_finite: bool) -> None:
        """Judge the step that has been taken.

        Args:
            is_finite: Whether its loss is finite. Otherwise the step was skipped, and the scale is as before it.
        """
        overflows = self.engine.skipped_steps > self.skipped
        self.is_exhausted = overflows and is_finite and self.is_dynamic and not self.adapts
        if overflows and not is_finite:
            self.engine.skipped_steps = self.skipped
            for name, value in self.before.items():
                setattr(self.scaler, name, value)
