"""Amounts as people write them (24GB, 32GB/s, 312TFLOPS) and hardware by name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from promptkd.errors import UserError

PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}

# Makers' data sheets: memory, dense half-precision tensor-core rate with the accumulation that training uses, memory
# bandwidth; bytes, operations and bytes a second.
GPUS = {
    "3090": (24e9, 71e12, 936e9),
    "4090": (24e9, 165e12, 1008e9),
    "a100-40": (40e9, 312e12, 1555e9),
    "a100": (80e9, 312e12, 2039e9),
    "h100": (80e9, 989e12, 3350e9),
    "h200": (141e9, 989e12, 4800e9),
}
# One direction, one GPU, peak.
LINKS = {
    "pcie3": 16e9,
    "pcie4": 32e9,
    "pcie5": 64e9,
    "nvlink3": 300e9,
    "nvlink4": 450e9,
    "ethernet-10g": 1.25e9,
    "ethernet-100g": 12.5e9,
    "infiniband-hdr": 25e9,
    "infiniband-ndr": 50e9,
}
# What of the peak a run gets: assumptions, to be replaced by measurement where there is one.
COMPUTE_SHARE = 0.4  # products of training at these sizes
BANDWIDTH_SHARE = 0.7  # of memory and of links


@dataclass(frozen=True)
class Hardware:
    """ranks processes, each with its device. Bytes, operations a second, bytes a second."""

    ranks: int
    memory: float
    flops: float
    bandwidth: float
    link: float  # between ranks of a machine
    network: float  # between machines
    per_node: int  # ranks of a machine
    cpu: bool


def amount(text: str, unit: str, option: str) -> float:
    """24GB, 24 GB, 24e9, 300GB/s, 71TFLOPS as a number. `unit`: B, B/s or FLOPS; without one the number is plain.

    Powers of ten; GiB are read as such. Raises UserError with an example.
    """
    pattern = r"([0-9.]+(?:e[+]?\d+)?)\s*([kmgtp]?)(i?)\s*(%s)?" % re.escape(unit.lower())  # noqa: UP031 - braces
    match = re.fullmatch(pattern, text.strip().lower().replace("flop/s", "flops"))
    try:
        value = float(match[1]) * (1.024 ** _thousands(match[2]) if match[3] else 1.0) * PREFIXES[match[2]]
    except (TypeError, ValueError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"{option} {text}: not an amount: write it like {_example(unit)}")
    return value


def link(text: str, option: str) -> float:
    """A link's rate, by name or as an amount."""
    if text.lower() in LINKS:
        return LINKS[text.lower()]
    if not text[:1].isdigit():
        raise UserError(f"{option} {text}: neither a rate like 32GB/s nor one of {', '.join(LINKS)}")
    return amount(text, "B/s", option)


def _thousands(prefix: str) -> int:
    return " kmgtp".index(prefix or " ")


def _example(unit: str) -> str:
    return {"B": "24GB", "B/s": "32GB/s", "FLOPS": "71TFLOPS"}[unit]


def short(value: float, unit: str = "B") -> str:
    """1234567890 -> 1.23 GB: three digits."""
    for prefix in ("P", "T", "G", "M", "k"):
        if value >= PREFIXES[prefix.lower()]:
            return f"{value / PREFIXES[prefix.lower()]:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    """As people say it: 3.1 s, 12 min, 5.2 h, 3.4 days."""
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.3g} s"
