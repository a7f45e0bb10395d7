"""PromptKD (paper, algorithm 1): the student answers, the teacher's prompt adapts, the student learns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from promptkd.config.values import at_least, is_text, option
from promptkd.data.batching import MicroBatch
from promptkd.errors import UserError
from promptkd.losses import FrozenLogits, Term, kl_loss
from promptkd.methods.base import Method, MethodContext, StepBatch
from promptkd.models.loading import check_positions
from promptkd.models.soft_prompt import SoftPrompt, initial_prompt
from promptkd.models.wrapper import LanguageModel, without_dropout

Divergence = Literal["reverse", "forward"]


@dataclass
class PromptKDSettings:
    teacher_lr: float | None = option(None, "the prompt's peak learning rate; default: --lr")
    prompt_len: int = option(7, "embeddings of the soft prompt")
    prompt_init_text: str = option(
        "Suppose you are a student.",
        "text whose embeddings the prompt starts from, or PAD, or random",
        nargs="+",
    )
    teacher_kld_type: Divergence = option("reverse", "prompted teacher against student, in prompt tuning")
    base_kld_type: Divergence = option("reverse", "prompted against unprompted teacher, in prompt tuning")
    student_kld_type: Divergence = option("reverse", "student against prompted teacher, in distillation")
    teacher_deepspeed_config: str | None = option(
        None,
        "DeepSpeed file of the teacher's engine (ZeRO-3 shares the teacher out over ranks); default: the student's",
        numbers=False,
    )
    base_coef: float = option(1.0, "weight of the unprompted teacher's term at the start; it falls to 0")

    def __post_init__(self) -> None:
        if not self.prompt_init_text.strip() or not is_text(self.prompt_init_text):
            raise UserError("--prompt-init-text is empty or no UTF-8: give a text, PAD or random")
        at_least(1, prompt_len=self.prompt_len)
        at_least(0, base_coef=self.base_coef)
        if self.teacher_lr is not None:
            at_least(0, teacher_lr=self.teacher_lr)


class PromptKD(Method):
    Settings = PromptKDSettings
    teacher_has_engine = True

    def __init__(self, context: MethodContext, settings: PromptKDSettings) -> None:
        super().__init__(context, settings)
        teacher = context.teacher.requires_grad_(False)
        check_positions(teacher.config, context.limits.max_length + settings.prompt_len, "--teacher-model-path")
        embedding = teacher.get_input_embeddings()
        start = initial_prompt(
            settings.prompt_init_text, settings.prompt_len, embedding, context.tokenizer, context.seed
        )
        prompted = LanguageModel(teacher, SoftPrompt(start), context.shared)
        rate = context.optimization.lr if settings.teacher_lr is None else settings.teacher_lr
        self.teacher = context.learner(prompted, replace(context.optimization, lr=rate))
        without_dropout(teacher)  # eval mode would not do: layers recompute activations in train mode alone
        self.teacher.train(False)
        self.start = self.prompt()

    def learners(self):
        return {"student": self.student, "prompt": self.teacher}

    def prompt(self) -> torch.Tensor:
        """P as it is now: float32 [prompt_len, width]."""
        return self.teacher.full_param(self.teacher.module.prompt.embeddings)

    def step(self, window: StepBatch) -> dict[str, float]:
        with window.timer("rollout"):
            keys = [(window.step, example.index) for example in window.examples]
            rollout = self.rollout(window.examples, keys, keep_states=True)
        micro_batches, tokens = self.micro_batches(window, rollout.responses)
        base_coef = (1 - window.step / window.total) * self.settings.base_coef
        with window.timer("prompt"):
            losses = self.tune_prompt(micro_batches, rollout.hidden_states, base_coef)
        with window.timer("student"):
            student_losses = self.distill_student(micro_batches)
        return {
            **student_losses,
            "prompt_kd_loss": losses["prompt_kd_loss"],
            "prompt_base_loss": losses["prompt_base_loss"] * base_coef,
            "base_coef_now": base_coef,
            "prompt_grad_norm": self.teacher.grad_norm,
            "prompt_drift": float((self.prompt() - self.start).norm()),
            "response_tokens": tokens,
        }

    def tune_prompt(
        self, micro_batches: list[MicroBatch], student_states: list[Tensor], base_coef: float
    ) -> dict[str, float]:
        """Take a step on P (paper, algorithm 1, phase 2).

        The loss is KL(prompted teacher || student) + base_coef * KL(prompted teacher || teacher). The student's
        hidden states are those it decoded with: its weights are the same and it has no dropout there.
        """
        options = self.settings
        self.teacher.train(self.teacher.module.model.is_gradient_checkpointing)

        def losses(batch: MicroBatch) -> dict[str, Term]:
            student = FrozenLogits(torch.cat([student_states[i] for i in batch.members]), self.student)
            teacher = self.teacher.predict(batch, prompted=False)
            return {
                "prompt_kd_loss": kl_loss(options.teacher_kld_type, student),
                "prompt_base_loss": kl_loss(options.base_kld_type, teacher, base_coef),
            }

        return self.teacher.update(micro_batches, losses)

    def distill_student(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """Take a step on the student, dropout on (phase 3): KL(student || prompted teacher) with the updated P."""
        self.student.train()
        kind = self.settings.student_kld_type
        return self.student.update(micro_batches, lambda mb: {"student_loss": kl_loss(kind, self.teacher.predict(mb))})
