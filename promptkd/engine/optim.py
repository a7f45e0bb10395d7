"""How a model learns: the optimizer's numbers and the schedule of its rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)

NOAM_END = 1e-7  # where the published schedule ends: transformers' default `lr_end`


@dataclass(frozen=True)
class OptimizerConfig:
    """How one model learns: AdamW, a schedule over `total` optimizer steps, clipping."""

    lr: float
    total: int
    style: str = "constant"
    lr_min: float = 1e-7
    warmup: int = 0
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)


def make_schedule(optimizer: torch.optim.Optimizer, how: OptimizerConfig) -> LRScheduler:
    """Return the published schedule: torch's cosine (without warm-up), transformers' constant, cosine or noam.

    A schedule never ends above the peak rate: a learner with rate 0 stays frozen under each of them.
    """
    if how.style == "cosine":
        return CosineAnnealingLR(optimizer, T_max=how.total, eta_min=min(how.lr_min, how.lr))
    # A rate that is no higher than where noam ends has nothing to decay, and transformers refuses it.
    if how.style == "noam" and how.lr > NOAM_END:
        # transformers divides by the steps after the warm-up, also in the call after the last step.
        total = max(how.total, how.warmup + 1)
        return get_polynomial_decay_schedule_with_warmup(optimizer, how.warmup, total, lr_end=NOAM_END, power=0.5)
    if how.style == "cosine_trm":
        return get_cosine_schedule_with_warmup(optimizer, how.warmup, how.total)
    return get_constant_schedule_with_warmup(optimizer, how.warmup)
