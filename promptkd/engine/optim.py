"""Hyperparameters of the optimizer, and its learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)

NOAM_END = 1e-7  # final rate of the published schedule, transformers' default `lr_end`


@dataclass(frozen=True)
class OptimizerConfig:
    """Hyperparameters of AdamW, of the schedule over `total` optimizer steps, and of gradient clipping."""

    lr: float
    total: int
    style: str = "constant"
    lr_min: float = 1e-7
    warmup: int = 0
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)


def make_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> LRScheduler:
    """Return the published schedule: torch's cosine without warmup, or transformers' constant, cosine or noam.

    No schedule exceeds the peak rate, so that a rate of 0 freezes a model under each of them.
    """
    schedule: LRScheduler
    if config.style == "cosine":
        return CosineAnnealingLR(optimizer, T_max=config.total, eta_min=min(config.lr_min, config.lr))
    # transformers refuses a peak rate that is not above the final one. Such a rate stays constant.
    if config.style == "noam" and config.lr > NOAM_END:
        # transformers divides by the number of steps after the warmup, also in the call after the last step.
        total = max(config.total, config.warmup + 1)
        schedule = get_polynomial_decay_schedule_with_warmup(  # type: ignore[no-untyped-call]
            optimizer, config.warmup, total, lr_end=NOAM_END, power=0.5
        )
    elif config.style == "cosine_trm":
        schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup, config.total)
    else:
        schedule = get_constant_schedule_with_warmup(optimizer, config.warmup)
    return schedule
