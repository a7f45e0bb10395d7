"""SFT: cross-entropy on the responses of the data."""

from __future__ import annotations

from promptkd.losses import CrossEntropy
from promptkd.methods.base import Method, StepBatch


class SFT(Method):
    """Supervised fine-tuning."""

    has_teacher = False

    def step(self, window: StepBatch) -> dict[str, float]:
        """Update the student on the responses of the data."""
        micro_batches, tokens = self.micro_batches(window, [example.response for example in window.examples])
        self.student.train()
        with window.timer("student"):
            losses = self.student.update(micro_batches, lambda mb: {"loss": CrossEntropy(mb.targets)})
        return {**losses, "response_tokens": tokens}
