"""DistiLLM-2 (Ko et al., ICML 2025): contrastive distillation on pairs of responses.

The loss is a skewed forward KL on the teacher's response to a prompt, and a skewed reverse KL with a detached mixture
on the student's. `tools/generate.py` makes both before training. Every response has the same weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from promptkd.config.values import option
from promptkd.data.batching import MicroBatch
from promptkd.data.dataset import ExampleSet
from promptkd.errors import UserError
from promptkd.losses import Term
from promptkd.methods.base import Method
from promptkd.methods.context import DatasetBundle, MethodContext, StepBatch
from promptkd.methods.divergence_options import DivergenceParameters

if TYPE_CHECKING:
    from promptkd.config.resolve import RunConfig


@dataclass
class DistiLLM2Settings(DivergenceParameters):
    student_data_dir: str = option(
        "", "folder with the student's responses to the prompts of --data-dir, in the same order", numbers=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.student_data_dir:
            raise UserError("--student-data-dir is missing: name a folder of the student's responses")


class DistiLLM2(Method):
    """Contrastive distillation. --data-dir holds the teacher's responses."""

    Settings = DistiLLM2Settings

    def __init__(self, context: MethodContext, settings: DistiLLM2Settings) -> None:
        super().__init__(context, settings)
        self.teacher = context.frozen_teacher()

    @classmethod
    def open_data(cls, config: RunConfig, tokenizer: Any) -> DatasetBundle:
        """Open the pairs of responses, and check that their prompts are the same."""
        bundle, options = super().open_data(config, tokenizer), config.data
        folder = config.method_settings.student_data_dir
        paired = ExampleSet.open(
            folder, "train", tokenizer, options.max_prompt_length, options.max_length, option="--student-data-dir",
            template=options.template, special_tokens=bundle.train.format.special_tokens,
        )  # fmt: skip
        count = len(bundle.train)
        same = (np.array_equal(bundle.train[i].prompt, paired[i].prompt) for i in range(count))
        if len(paired) != count or not all(same):
            raise UserError(
                f"--student-data-dir {folder}: its prompts are not those of --data-dir {options.data_dir}: generate "
                "both with tools/generate.py from the same file"
            )
        return replace(bundle, paired=paired, folders={**bundle.folders, "student_data": folder})

    def step(self, step_batch: StepBatch) -> dict[str, float]:
        """Update the student on the responses of the teacher and on its own earlier ones."""
        paired = self.context.data.paired
        assert paired is not None
        own = replace(step_batch, examples=[paired[example.index] for example in step_batch.examples])
        teacher_batches, tokens = self.micro_batches(step_batch, [each.response for each in step_batch.examples])
        student_batches, own_tokens = self.micro_batches(own, [each.response for each in own.examples], "student")

        def losses(batch: MicroBatch) -> dict[str, Term]:
            target = self.teacher.predict(batch)
            if batch.source == "student":
                return {"student_response_loss": self.settings.term("skew_reverse_kl_detached", target)}
            return {"teacher_response_loss": self.settings.term("skew_forward_kl", target)}

        self.student.train()
        with step_batch.timer("student"):
            row = self.student.update([*teacher_batches, *student_batches], losses)
        return {"loss": sum(row.values()), **row, "response_tokens": tokens + own_tokens}

    def token_weights(self, lengths: list[int], tokens: int, batch_size: int) -> list[float]:
        """Return weights that make the loss a mean over a response's tokens, then over responses."""
        count = len(lengths) * self.context.ranks.dp_size
        return [1 / (max(length, 1) * count) for length in lengths]
