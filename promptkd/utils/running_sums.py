"""Cumulative sums that are also available with deterministic algorithms."""

from __future__ import annotations

import torch
from torch import Tensor


def running_sums(values: Tensor) -> Tensor:
    """Return the cumulative sums of nonnegative floats along the last dimension. May overwrite `values`.

    CUDA has no deterministic cumsum of floats. With --deterministic, sums over 2, 4, 8... neighbors are added instead.
    Rounding differs between neighbors there, so that `cummax` keeps the sums in order.
    """
    if not (values.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return values.cumsum_(-1)
    distance = 1
    while distance < values.size(-1):
        values = values + torch.nn.functional.pad(values[..., :-distance], (distance, 0))
        distance *= 2
    return values.cummax(-1).values
