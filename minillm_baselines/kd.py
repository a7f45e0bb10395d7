"""KD: cross-entropy on the data's responses, mixed with soft cross-entropy against the teacher there."""

from __future__ import annotations

from dataclasses import dataclass

from promptkd.config.values import option
from promptkd.data.batching import MicroBatch
from promptkd.engine.engine import FrozenModel
from promptkd.errors import UserError
from promptkd.losses import CrossEntropy, ForwardKL, Term
from promptkd.methods.base import Method, MethodContext, StepBatch
from promptkd.models.wrapper import LanguageModel


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
            self.teacher = FrozenModel(LanguageModel(context.teacher, shared=context.shared), context.ranks.device)

    @classmethod
    def needs_teacher(cls, settings: KDSettings) -> bool:
        return settings.kd_ratio > 0

    def step(self, window: StepBatch) -> dict[str, float]:
        """Update the student on the responses of the data, towards their tokens and the teacher's distribution."""
        micro_batches, tokens = self.micro_batches(window, [example.response for example in window.examples])
        self.student.train()
        with window.timer("student"):
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
