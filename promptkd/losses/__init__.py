"""Losses: what a micro-batch is compared with, and the fused sum of it over the vocabulary."""

from promptkd.losses.divergences import DIVERGENCES, divergence, resolve_parameters
from promptkd.losses.fused import fused_loss, kl_divergences, log_probs, positions_at_a_time, reference_loss
from promptkd.losses.terms import (
    ClippedPolicy,
    CrossEntropy,
    Divergence,
    ForwardKL,
    FrozenLogits,
    ReverseKL,
    Term,
)
from promptkd.utils.memory import BLOCK, CHUNK

__all__ = [
    "BLOCK",
    "CHUNK",
    "DIVERGENCES",
    "ClippedPolicy",
    "CrossEntropy",
    "Divergence",
    "ForwardKL",
    "FrozenLogits",
    "ReverseKL",
    "Term",
    "divergence",
    "fused_loss",
    "kl_divergences",
    "log_probs",
    "positions_at_a_time",
    "reference_loss",
    "resolve_parameters",
]
