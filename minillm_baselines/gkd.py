"""GKD (Agarwal et al., ICLR 2024): distillation on a mixture of the student's own responses and given ones.

With --student-data-fraction 1, it is on-policy distillation: with reverse_kl it is PromptKD without its prompt, and
with forward_kl it is ImitKD (Lin et al., 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minillm_baselines.kd import KD, OfflineKDSettings
from promptkd.config.values import fraction, option
from promptkd.data.batching import MicroBatch, TokenIds
from promptkd.errors import UserError
from promptkd.losses import Term
from promptkd.methods.context import StepBatch
from promptkd.methods.divergence_options import divergence_option


@dataclass
class GKDSettings(OfflineKDSettings):
    divergence: str = divergence_option("jsd")
    kd_ratio: float = option(1.0, "weight of the distillation loss. Cross-entropy is weighted by 1 - kd_ratio")
    student_data_fraction: float = option(
        0.5, "probability of using the student's response to a prompt instead of the response in the data"
    )
    seq_kd: bool = option(False, "use the teacher's responses to the other prompts instead of those in the data")

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction(student_data_fraction=self.student_data_fraction)
        if self.teacher_cache and (self.student_data_fraction or self.seq_kd):
            raise UserError(
                "--teacher-cache has no states of fresh responses: leave it out, or pass --student-data-fraction 0 "
                "without --seq-kd"
            )


class GKD(KD):
    """Generalized knowledge distillation."""

    Settings = GKDSettings

    def examples(self, step_batch: StepBatch) -> tuple[StepBatch, Sequence[TokenIds]]:
        """Return the prompts, each with the student's response or the given one."""
        given = None
        if self.settings.seq_kd:
            with step_batch.timer("teacher_rollout"):
                given = self.generate(step_batch, range(len(step_batch.examples)), model=self.teacher).responses
        return step_batch, self.mixed_responses(step_batch, self.settings.student_data_fraction, given)[0]

    def losses(self, batch: MicroBatch) -> dict[str, Term]:
        """Return the losses of a micro-batch by name. The cross-entropy is left out if it has no weight."""
        losses = super().losses(batch)
        return {name: term for name, term in losses.items() if term.coefficient}
