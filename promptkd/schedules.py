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


@dataclass(frozen=True)
class Optimization:
    """How one model learns: AdamW, a schedule over `total` optimizer steps, clipping."""

    lr: float
    total: int
    style: str = "constant"
    lr_min: float = 1e-7
    warmup: int = 0
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)


def make_schedule(optimizer: torch.optim.Optimizer, how: Optimization) -> LRScheduler:
    """The published schedules: torch's cosine (without warm-up), transformers' constant, cosine and noam."""
    if how.style == "cosine":
        return CosineAnnealingLR(optimizer, T_max=how.total, eta_min=how.lr_min)
    if how.style == "noam":
        return get_polynomial_decay_schedule_with_warmup(optimizer, how.warmup, how.total, power=0.5)
    if how.style == "cosine_trm":
        return get_cosine_schedule_with_warmup(optimizer, how.warmup, how.total)
    return get_constant_schedule_with_warmup(optimizer, how.warmup)
