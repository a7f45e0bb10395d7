"""KD: cross-entropy on the data's responses, mixed with soft cross-entropy against the teacher there."""

from __future__ import annotations

from dataclasses import dataclass

from promptkd.config.values import option
from promptkd.data.batching import MicroBatch
from promptkd.engine.engine import FrozenModel
from promptkd.errors import UserError
from promptkd.losses import CrossEntropy, ForwardKL, FrozenLogits, fused_loss
from promptkd.methods.base import Method, MethodContext, StepBatch
from promptkd.models.wrapper import LanguageModel


@dataclass
class KDSettings:
    kd_ratio: float = option(0.5, "weight of the teacher's term; 1 - it: of the data's tokens")

    def __post_init__(self) -> None:
        if not 0 <= self.kd_ratio <= 1:
            raise UserError(f"--kd-ratio {self.kd_ratio} is not between 0 and 1")


class KD(Method):
    Settings = KDSettings

    def __init__(self, context: MethodContext, settings: KDSettings) -> None:
        super().__init__(context, settings)
        if self.needs_teacher(settings):
            self.teacher = FrozenModel(LanguageModel(context.teacher, shared=context.shared), context.ranks.device)

    @classmethod
    def needs_teacher(cls, settings: KDSettings) -> bool:
        return settings.kd_ratio > 0

    def step(self, window: StepBatch) -> dict[str, float]:
        batches, tokens = self.micro_batches(window, [example.response for example in window.examples])
        self.student.train()
        ratio = self.settings.kd_ratio

        def loss_of(batch: MicroBatch):
            if not ratio:
                return lambda hidden, head: fused_loss(hidden, head, [CrossEntropy(batch.targets)], batch.weights)
            teacher_hidden = self.teacher.hidden_states(batch)

            def loss(hidden, head):
                with self.teacher.lm_head() as teacher_head:
                    soft = ForwardKL(FrozenLogits(teacher_hidden, teacher_head), ratio)
                    return fused_loss(hidden, head, [CrossEntropy(batch.targets, 1 - ratio), soft], batch.weights)

            return loss

        with window.clock("student"):
            lm_loss, *ds_loss = self.student.update(batches, loss_of).tolist()
        if not ds_loss:
            return {"loss": lm_loss, "lm_loss": lm_loss, "response_tokens": tokens}
        loss = (1 - ratio) * lm_loss + ratio * ds_loss[0]
        return {"loss": loss, "lm_loss": lm_loss, "ds_loss": ds_loss[0], "response_tokens": tokens}
