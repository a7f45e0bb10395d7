"""SFT: cross-entropy on the responses of the data."""

from __future__ import annotations

from promptkd.data.batching import MicroBatch
from promptkd.losses import CrossEntropy, fused_loss
from promptkd.methods.base import Method, StepBatch


class SFT(Method):
    has_teacher = False

    def step(self, window: StepBatch) -> dict[str, float]:
        batches, tokens = self.micro_batches(window, [example.response for example in window.examples])
        self.student.train()

        def loss_of(batch: MicroBatch):
            return lambda hidden, head: fused_loss(hidden, head, [CrossEntropy(batch.targets)], batch.weights)

        with window.clock("student"):
            loss = float(self.student.update(batches, loss_of)[0])
        return {"loss": loss, "response_tokens": tokens}
