"""The devices of a plan: their number and memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from promptkd.errors import UserError

GPUS = {"3090": 24e9, "4090": 24e9, "a100-40": 40e9, "a100": 80e9, "h100": 80e9, "h200": 141e9}  # bytes
CPU_MEMORY = 16e9
AMOUNT = re.compile(r"(\d*\.?\d+(?:e\+?\d+)?)\s*([kmgtp]?)(i?)b?")


@dataclass(frozen=True)
class Hardware:
    """The devices of a run, one for each rank."""

    ranks: int
    memory: float  # bytes of one GPU, or of the machine with `cpu`
    per_node: int  # ranks of a machine
    cpu: bool

    @property
    def device(self) -> str:
        """The device type, as in `utils.memory`."""
        return "cpu" if self.cpu else "cuda"


def parse_bytes(text: str, option: str) -> float:
    """Parse an amount of memory such as 24GB, 24 GB, 16GiB or 24e9.

    Raises:
        UserError: If the text is not a positive amount.
    """
    match = AMOUNT.fullmatch(text.strip().lower())
    value = float(match[1]) * (1024 if match[3] else 1000) ** " kmgtp".index(match[2] or " ") if match else 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"{option} {text}: not an amount of memory: write it like 24GB")
    return value
