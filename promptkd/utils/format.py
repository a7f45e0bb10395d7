"""Format quantities for people: bytes, durations and counts with three significant digits, means with a deviation."""

from __future__ import annotations

BYTES = ((1e15, " PB"), (1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"))
DURATIONS = ((86400.0, " days"), (3600.0, " h"), (60.0, " min"))
COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def format_bytes(size: float) -> str:
    """Format a number of bytes in powers of 1000, like `"54.9 kB"` or `"2.6 GB"`."""
    return _scaled(size, BYTES, " B")


def format_duration(seconds: float) -> str:
    """Format seconds like `"3.1 s"`, `"12 min"`, `"5.2 h"` or `"3.4 days"`.

    A unit is used from two of it on, so 90 seconds stay `"90 s"`.
    """
    for size, name in DURATIONS:
        if seconds >= 2 * size:
            return f"{seconds / size:.3g}{name}"
    return f"{seconds:.3g} s"


def format_count(count: float) -> str:
    """Format a count of parameters, tokens or examples like `"124M"` or `"1.3B"`."""
    return _scaled(count, COUNTS, "")


def format_spread(mean: float, std: float | None, digits: int = 2) -> str:
    """Format a mean and its standard deviation like `"61.00 ± 1.41"`. A single value has no deviation."""
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def _scaled(value: float, units: tuple[tuple[float, str], ...], smallest: str) -> str:
    """Divide by the largest unit that leaves at least 1 after rounding to three digits."""
    for size, name in units:
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.0f}{name}" if abs(scaled) >= 999.5 else f"{scaled:.3g}{name}"
    return f"{value:.3g}{smallest}"
