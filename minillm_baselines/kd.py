"""KD: a divergence from the teacher on the responses of the data, mixed with cross-entropy on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from promptkd.config.values import fraction, option
from promptkd.data.batching import MicroBatch, TokenIds
from promptkd.errors import UserError
from promptkd.losses import CrossEntropy, Term
from promptkd.methods.base import Method
from promptkd.methods.context import MethodContext, StepBatch
from promptkd.methods.divergence_options import DivergenceSettings

if TYPE_CHECKING:
    from promptkd.config.resolve import RunOptions


@dataclass
class KDSettings(DivergenceSettings):
    kd_ratio: float = option(0.5, "weight of the distillation loss. Cross-entropy is weighted by 1 - kd_ratio")

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction(kd_ratio=self.kd_ratio)


@dataclass
class OfflineKDSettings(KDSettings):
    """Options of KD on given responses, for which the teacher's states can be cached."""

    teacher_cache: str | None = option(
        None,
        "folder of the teacher's hidden states on the responses of the data. The first run makes it, and later runs "
        "load only the teacher's output head",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_cache == "":
            raise UserError("--teacher-cache is empty: name a folder")
        if self.teacher_cache and not self.kd_ratio:
            raise UserError("--kd-ratio 0 uses no teacher: leave --teacher-cache out")


class KD(Method):
    """Knowledge distillation on the responses of the data. Subclasses choose other responses."""

    Settings: ClassVar[type] = OfflineKDSettings

    def __init__(self, context: MethodContext, settings: KDSettings) -> None:
        super().__init__(context, settings)
        if self.needs_teacher(settings):
            self.teacher = context.frozen_teacher()

    @classmethod
    def needs_teacher(cls, settings: KDSettings) -> bool:
        """Return whether the loss has a distillation term."""
        return settings.kd_ratio > 0

    @classmethod
    def check(cls, options: RunOptions) -> None:
        """Raise UserError if options need more of the teacher than a cache has."""
        if getattr(options.method_settings, "teacher_cache", None) is None:
            return
        if options.run.exposure_bias_every:
            raise UserError("--exposure-bias-every runs the teacher: leave --teacher-cache out")
        if options.parallel.teacher_size > 1:
            raise UserError("--teacher-cache needs an unpartitioned teacher: pass --teacher-model-parallel-size 1")

    def examples(self, step_batch: StepBatch) -> tuple[StepBatch, Sequence[TokenIds]]:
        """Return the prompts and responses to train on: those of the data."""
        return step_batch, [example.response for example in step_batch.examples]

    def step(self, step_batch: StepBatch) -> dict[str, float]:
        """Update the student towards the tokens of the responses and the teacher's distribution."""
        chosen, responses = self.examples(step_batch)
        micro_batches, tokens = self.micro_batches(chosen, responses)
        corpus = self.corpus_batches(step_batch)

        def losses(batch: MicroBatch) -> dict[str, Term]:
            if batch.source == "corpus":
                return {"corpus_loss": CrossEntropy(batch.targets, self.settings.lm_coef)}
            return self.losses(batch)

        self.student.train()
        with step_batch.timer("student"):
            row = self.student.update([*micro_batches, *corpus], losses)
        ratio = self.settings.kd_ratio
        loss = (1 - ratio) * row.get("lm_loss", 0.0) + ratio * row.get("ds_loss", 0.0)
        if corpus:
            loss += self.settings.lm_coef * row["corpus_loss"]
        return {"loss": loss, **row, "response_tokens": tokens}

    def losses(self, batch: MicroBatch) -> dict[str, Term]:
        """Return the losses of a micro-batch by name."""
        options = self.settings
        losses: dict[str, Term] = {"lm_loss": CrossEntropy(batch.targets, 1 - options.kd_ratio)}
        if options.kd_ratio:
            losses["ds_loss"] = options.term(options.divergence, self.teacher.predict(batch), options.kd_ratio)
        return losses
