"""KD: cross-entropy on the responses of the data, mixed with a divergence from the teacher on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

from promptkd.config.values import option
from promptkd.data.batching import MicroBatch
from promptkd.errors import UserError
from promptkd.losses import CrossEntropy, ForwardKL, Term
from promptkd.methods.base import Method
from promptkd.methods.context import MethodContext, StepBatch


@dataclass
class KDSettings:
    kd_ratio: float = option(0.5, "weight of the distillation loss; cross-entropy is weighted by 1 - kd_ratio")

    def __post_init__(self) -> None:
        if not 0 <= self.kd_ratio <= 1:
            raise UserError(f"--kd-ratio {self.kd_ratio} is not between 0 and 1")


class KD(Method):
    """Knowledge distillation on the responses of the data."""

    Settings = KDSettings

    def __init__(self, context: MethodContext, settings: KDSettings) -> None:
        super().__init__(context, settings)
        if self.needs_teacher(settings):
            self.teacher = context.frozen_teacher()

    @classmethod
    def needs_teacher(cls, settings: KDSettings) -> bool:
        return settings.kd_ratio > 0

    def step(self, step_batch: StepBatch) -> dict[str, float]:
        """Update the student on the responses of the data, towards their tokens and the teacher's distribution."""
        micro_batches, tokens = self.micro_batches(step_batch, [example.response for example in step_batch.examples])
        self.student.train()
        with step_batch.timer("student"):
            losses = self.student.update(micro_batches, self.losses)
        ratio = self.settings.kd_ratio
        loss = (1 - ratio) * losses["lm_loss"] + ratio * losses.get("ds_loss", 0.0)
        return {"loss": loss, **losses, "response_tokens": tokens}

    def losses(self, batch: MicroBatch) -> dict[str, Term]:
        """Return the losses of a micro-batch by name."""
        ratio = self.settings.kd_ratio
        losses: dict[str, Term] = {"lm_loss": CrossEntropy(batch.targets, 1 - ratio)}
        if ratio:
            losses["ds_loss"] = ForwardKL(self.teacher.predict(batch), ratio)
        return losses
