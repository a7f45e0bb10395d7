"""Format quantities for people: bytes and durations with three significant digits, means with a deviation."""

from __future__ import annotations

BYTES = ((1e15, " PB"), (1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"))
DURATIONS = ((86400.0, " days"), (3600.0, " h"), (60.0, " min"))


def format_bytes(size: float) -> str:
    """Format a number of bytes in powers of 1000, like `"54.9 kB"` or `"2.6 GB"`."""
    for unit, name in BYTES:
        if abs(size) >= 0.9995 * unit:  # at least 1 after rounding to three digits
            scaled = size / unit
            return f"{scaled:.0f}{name}" if abs(scaled) >= 999.5 else f"{scaled:.3g}{name}"
    return f"{size:.3g} B"


def format_duration(seconds: float) -> str:
    """Format seconds like `"3.1 s"`, `"12 min"`, `"5.2 h"` or `"3.4 days"`.

    A unit is used from two of it on, so 90 seconds stay `"90 s"`.
    """
    for size, name in DURATIONS:
        if seconds >= 2 * size:
            return f"{seconds / size:.3g}{name}"
    return f"{seconds:.3g} s"


def format_spread(mean: float, std: float | None, digits: int = 2) -> str:
    """Format a mean and its standard deviation like `"61.00 ± 1.41"`. A single value has no deviation."""
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")
