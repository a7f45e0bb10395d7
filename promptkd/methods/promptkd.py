"""PromptKD (paper, algorithm 1): the student responds, the teacher's prompt adapts, the student is distilled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from promptkd.config.values import at_least, is_text, option
from promptkd.data.batching import MicroBatch
from promptkd.engine.engine import TrainEngine
from promptkd.errors import UserError
from promptkd.losses import FrozenLogits, Term, kl_loss
from promptkd.methods.base import Method
from promptkd.methods.context import MethodContext, StepBatch
from promptkd.models.loading import check_positions
from promptkd.models.soft_prompt import SoftPrompt, initial_prompt
from promptkd.models.wrapper import LanguageModel, without_dropout

Divergence = Literal["reverse", "forward"]


@dataclass
class PromptKDSettings:
    teacher_lr: float | None = option(None, "peak learning rate of the prompt; default: --lr")
    prompt_len: int = option(7, "number of embeddings of the soft prompt")
    prompt_init_text: str = option(
        "Suppose you are a student.",
        "initial prompt: a text, whose token embeddings are used, or PAD, or random",
        nargs="+",
    )
    teacher_kld_type: Divergence = option(
        "reverse", "direction of the KL between prompted teacher and student in prompt tuning"
    )
    base_kld_type: Divergence = option(
        "reverse", "direction of the KL between prompted and unprompted teacher in prompt tuning"
    )
    student_kld_type: Divergence = option(
        "reverse", "direction of the KL between student and prompted teacher in distillation"
    )
    base_coef: float = option(1.0, "initial weight of the unprompted teacher's term, which falls linearly to 0")

    def __post_init__(self) -> None:
        if not self.prompt_init_text.strip() or not is_text(self.prompt_init_text):
            raise UserError("--prompt-init-text is empty or not UTF-8: give a text, PAD or random")
        at_least(1, prompt_len=self.prompt_len)
        at_least(0, base_coef=self.base_coef)
        if self.teacher_lr is not None:
            at_least(0, teacher_lr=self.teacher_lr)


class PromptKD(Method):
    """PromptKD: tune a soft prompt of the teacher to the student, then distill from the prompted teacher."""

    Settings = PromptKDSettings
    teacher_has_engine = True

    def __init__(self, context: MethodContext, settings: PromptKDSettings) -> None:
        super().__init__(context, settings)
        assert context.teacher is not None  # `check_options` has seen to it
        teacher = context.teacher.requires_grad_(False)
        check_positions(teacher.config, context.limits.max_length + settings.prompt_len, "--teacher-model-path")
        start = initial_prompt(
            settings.prompt_init_text,
            settings.prompt_len,
            cast(nn.Embedding, teacher.get_input_embeddings()),
            context.tokenizer,
            context.seed,
        )
        rate = context.optimization.lr if settings.teacher_lr is None else settings.teacher_lr
        self.prompted_teacher = context.make_engine(
            LanguageModel(teacher, SoftPrompt(start), context.shared), replace(context.optimization, lr=rate)
        )
        self.teacher = self.prompted_teacher
        # Evaluation mode is not enough: layers recompute activations in training mode only.
        without_dropout(teacher)
        self.prompted_teacher.train(False)
        self.initial_prompt = self.prompt()

    def learners(self) -> dict[str, TrainEngine]:
        """Return the engines of student and prompt. Checkpoints of version 0.1 call the prompt "teacher"."""
        return {"student": self.student, "teacher": self.prompted_teacher}

    def prompt(self) -> Tensor:
        """Return the soft prompt P, float32 `(prompt_len, hidden)`."""
        soft_prompt = self.prompted_teacher.module.prompt
        assert soft_prompt is not None
        return self.prompted_teacher.full_param(soft_prompt.embeddings)

    def step(self, step_batch: StepBatch) -> dict[str, float]:
        """Let the student answer (phase 1), tune the prompt (phase 2), and update the student (phase 3)."""
        with step_batch.timer("rollout"):
            keys = [(step_batch.step, example.index) for example in step_batch.examples]
            rollout = self.rollout(step_batch.examples, keys, keep_states=True)
        micro_batches, tokens = self.micro_batches(step_batch, rollout.responses)
        base_coef = (1 - step_batch.step / step_batch.total) * self.settings.base_coef
        with step_batch.timer("prompt"):
            losses = self.tune_prompt(micro_batches, rollout.hidden_states, base_coef)
        with step_batch.timer("student"):
            student_losses = self.distill_student(micro_batches)
        return {
            **student_losses,
            "prompt_kd_loss": losses["prompt_kd_loss"],
            "prompt_base_loss": losses["prompt_base_loss"] * base_coef,
            "base_coef_now": base_coef,
            "prompt_grad_norm": self.prompted_teacher.grad_norm,
            "prompt_drift": float((self.prompt() - self.initial_prompt).norm()),
            "response_tokens": tokens,
        }

    def tune_prompt(
        self, micro_batches: list[MicroBatch], student_states: list[Tensor] | None, base_coef: float
    ) -> dict[str, float]:
        """Take a step on P (paper, algorithm 1, phase 2).

        The loss is KL(prompted teacher || student) + base_coef * KL(prompted teacher || teacher).

        Args:
            micro_batches: Prompts and the student's responses.
            student_states: Hidden states that the student decoded with, which has the same weights now and no dropout
                then. If they are None, the student runs again.
            base_coef: Weight of the second term.
        """
        options = self.settings
        self.prompted_teacher.train(self.prompted_teacher.module.model.is_gradient_checkpointing)

        def losses(batch: MicroBatch) -> dict[str, Term]:
            if student_states is None:
                student = self.student.predict(batch)
            else:
                student = FrozenLogits(torch.cat([student_states[i] for i in batch.members]), self.student)
            teacher = self.prompted_teacher.predict(batch, prompted=False)
            return {
                "prompt_kd_loss": kl_loss(options.teacher_kld_type, student),
                "prompt_base_loss": kl_loss(options.base_kld_type, teacher, base_coef),
            }

        return self.prompted_teacher.update(micro_batches, losses)

    def distill_student(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """Take a step on the student, with dropout (phase 3): KL(student || prompted teacher) with the new P."""
        self.student.train()
        kind = self.settings.student_kld_type
        return self.student.update(
            micro_batches, lambda mb: {"student_loss": kl_loss(kind, self.prompted_teacher.predict(mb))}
        )
