"""What the divergences share: operations on rows, one for each token."""

from __future__ import annotations

import torch
from torch import Tensor

LossAndGradient = tuple[Tensor, Tensor]

# Rows that an expensive divergence works on at a time. Its temporary tensors are then small next to a GPU's block.
ROWS = 64


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot products of rows, `(rows,)`. On a CPU, torch's batched form would store the product first."""
    if a.device.type == "cpu" and len(a):
        return torch.stack([torch.dot(x, y) for x, y in zip(a, b)])
    dots: Tensor = torch.linalg.vecdot(a, b)
    return dots


def log_ratio(log_a: Tensor, log_b: Tensor, a: Tensor, out: Tensor | None = None) -> Tensor:
    """Return log(a / b) where a > 0 and 0 elsewhere, because it is multiplied by a and the limit of that is 0.

    On a CPU, values stay where all are finite: their products with 0 are 0, and a sum costs less than two masks.
    """
    ratio = torch.sub(log_a, log_b, out=out)
    if ratio.device.type == "cpu" and ratio.sum().isfinite():
        return ratio
    return ratio.masked_fill_(a == 0, 0.0)
