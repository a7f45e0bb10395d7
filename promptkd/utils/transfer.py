"""Copies from the host to the device that do not wait for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on the device. A copy to a GPU is queued behind its work, and the host does not wait.

    Only memory that the system cannot move is copied this way, so the values are pinned first. torch keeps the pinned
    block until the copy is done.
    """
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
