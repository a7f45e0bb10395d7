"""PromptKD (paper, algorithm 1): the student responds, the teacher's prompt adapts, the student is distilled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from promptkd.config.values import at_least, fraction, option
from promptkd.data.batching import MicroBatch
from promptkd.engine.engine import TrainEngine
from promptkd.errors import UserError
from promptkd.losses import DIVERGENCES, FrozenLogits, Term
from promptkd.methods.base import Method
from promptkd.methods.context import MethodContext, StepBatch
from promptkd.methods.divergence_options import PUBLISHED_NAMES, DivergenceParameters
from promptkd.models.loading import check_positions
from promptkd.models.soft_prompt import SoftPrompt, initial_prompt, load_prompt
from promptkd.models.wrapper import LanguageModel, without_dropout

INIT_TEXT = "Suppose you are a student."  # as published


def kl_option(default: str, help: str) -> Any:
    """Return the field of an option that chooses a divergence by its published name or by ours."""
    return option(default, help, choices=[*PUBLISHED_NAMES, *DIVERGENCES])


@dataclass
class PromptKDSettings(DivergenceParameters):
    teacher_lr: float | None = option(None, "peak learning rate of the soft prompt (default: --lr)")
    prompt_len: int = option(7, "number of embeddings of the soft prompt. 0: on-policy distillation without a prompt")
    prompt_init_text: str = option(
        INIT_TEXT,
        "initialization of the soft prompt: the token embeddings of a text, PAD, or random",
        nargs="+",
    )
    prompt_init: str | None = option(
        None, "initialization of the soft prompt: prompt/ of an earlier run, instead of a text", numbers=False
    )
    teacher_kld_type: str = kl_option("reverse", "divergence of prompted teacher and student in prompt tuning")
    base_kld_type: str = kl_option("reverse", "divergence of prompted and unprompted teacher in prompt tuning")
    student_kld_type: str = kl_option("reverse", "divergence of student and prompted teacher in distillation")
    base_coef: float = option(
        1.0, "initial weight of the divergence of prompted and unprompted teacher. It falls linearly to 0"
    )
    student_data_fraction: float = option(
        1.0, "probability of using the student's response to a prompt instead of the response in the data"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt_init_text.strip():
            raise UserError("--prompt-init-text is empty: give a text, PAD or random")
        at_least(0, prompt_len=self.prompt_len, base_coef=self.base_coef)
        if self.prompt_init is not None and (not self.prompt_len or self.prompt_init_text != INIT_TEXT):
            raise UserError("--prompt-init goes with neither --prompt-init-text nor --prompt-len 0: leave these out")
        fraction(student_data_fraction=self.student_data_fraction)
        if self.teacher_lr is not None:
            at_least(0, teacher_lr=self.teacher_lr)


class PromptKD(Method):
    """PromptKD: tune a soft prompt of the teacher to the student, then distill from the prompted teacher."""

    Settings = PromptKDSettings

    def __init__(self, context: MethodContext, settings: PromptKDSettings) -> None:
        super().__init__(context, settings)
        self.prompted_teacher: TrainEngine | None = None
        if not settings.prompt_len:
            self.teacher = context.frozen_teacher()
            return
        assert context.teacher is not None  # `check_options` has seen to it
        teacher = context.teacher.requires_grad_(False)
        check_positions(teacher.config, context.limits.max_length + settings.prompt_len, "--teacher-model-path")
        embedding, length = cast(nn.Embedding, teacher.get_input_embeddings()), settings.prompt_len
        if settings.prompt_init is not None:
            start = load_prompt(Path(settings.prompt_init), embedding.weight.size(1), length)
        else:
            start = initial_prompt(settings.prompt_init_text, length, embedding, context.tokenizer, context.seed)
        rate = context.optimization.lr if settings.teacher_lr is None else settings.teacher_lr
        self.prompted_teacher = context.make_engine(
            LanguageModel(teacher, SoftPrompt(start), context.shared), replace(context.optimization, lr=rate)
        )
        self.teacher = self.prompted_teacher
        # Evaluation mode is not enough: layers recompute activations in training mode only.
        without_dropout(teacher)
        self.prompted_teacher.train(False)
        self.initial_prompt = cast(Tensor, self.prompt())

    @classmethod
    def trains_teacher(cls, settings: PromptKDSettings) -> bool:
        """Return whether there is a prompt."""
        return settings.prompt_len > 0

    def learners(self) -> dict[str, TrainEngine]:
        """Return the engines of student and prompt."""
        prompt = {} if self.prompted_teacher is None else {"prompt": self.prompted_teacher}
        return {"student": self.student, **prompt}

    def prompt(self) -> Tensor | None:
        """Return the soft prompt P, float32 `(prompt_len, hidden)`."""
        if self.prompted_teacher is None:
            return None
        soft_prompt = self.prompted_teacher.module.prompt
        assert soft_prompt is not None
        return self.prompted_teacher.full_param(soft_prompt.embeddings)

    def step(self, step_batch: StepBatch) -> dict[str, float]:
        """Let the student answer (phase 1), tune the prompt (phase 2), and update the student (phase 3)."""
        fraction = self.settings.student_data_fraction
        keep_states = self.prompted_teacher is not None
        responses, states = self.mixed_responses(step_batch, fraction, keep_states=keep_states)
        micro_batches, tokens = self.micro_batches(step_batch, responses)
        row: dict[str, float] = {}
        if self.prompted_teacher is not None:
            base_coef = (1 - step_batch.step / step_batch.total) * self.settings.base_coef
            with step_batch.timer("prompt"):
                row = self.tune_prompt(self.prompted_teacher, micro_batches, states, base_coef)
        with step_batch.timer("student"):
            student_losses = self.distill_student(micro_batches)
        return {**student_losses, **row, "response_tokens": tokens}

    def tune_prompt(
        self, teacher: TrainEngine, micro_batches: list[MicroBatch], states: list[Tensor] | None, base_coef: float
    ) -> dict[str, float]:
        """Take a step on P (paper, algorithm 1, phase 2).

        The loss is KL(prompted teacher || student) + base_coef * KL(prompted teacher || teacher).

        Args:
            teacher: The prompted teacher.
            micro_batches: Prompts and the student's responses.
            states: Hidden states that the student decoded with, which has the same weights now and no dropout then. If
                they are None, the student runs again.
            base_coef: Weight of the second term.
        """
        options = self.settings
        # transformers recomputes activations only in training mode. Its own property for this changed names in 5.23.
        teacher.train(any(getattr(part, "gradient_checkpointing", False) for part in teacher.module.modules()))

        def losses(batch: MicroBatch) -> dict[str, Term]:
            if states is None:
                student = self.student.predict(batch)
            else:
                student = FrozenLogits(torch.cat([states[i] for i in batch.members]), self.student)
            unprompted = teacher.predict(batch, prompted=False)
            return {
                "prompt_kd_loss": options.term(options.teacher_kld_type, student),
                "prompt_base_loss": options.term(options.base_kld_type, unprompted, base_coef),
            }

        row = teacher.update(micro_batches, losses)
        return {
            "prompt_kd_loss": row["prompt_kd_loss"],
            "prompt_base_loss": row["prompt_base_loss"] * base_coef,
            "base_coef_now": base_coef,
            "prompt_grad_norm": teacher.grad_norm,
            "prompt_drift": float((cast(Tensor, self.prompt()) - self.initial_prompt).norm()),
        }

    def distill_student(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """Take a step on the student, with dropout (phase 3): KL(student || prompted teacher) with the new P."""
        self.student.train()
        options = self.settings
        return self.student.update(
            micro_batches,
            lambda mb: {"student_loss": options.term(options.student_kld_type, self.teacher.predict(mb))},
        )
