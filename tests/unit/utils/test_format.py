"""Test the formatting of quantities as text."""

from __future__ import annotations

import pytest

from promptkd.utils.format import format_bytes, format_duration, format_spread


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (54_900, "54.9 kB"), (10**6 - 1, "1 MB"), (253_400_000, "253 MB"),
     (2.63e9, "2.63 GB"), (7.2e12, "7.2 TB"), (1.5e15, "1.5 PB"), (12_345e15, "12345 PB")],
)  # fmt: skip
def test_format_bytes_three_digits(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0031, "0.0031 s"), (3.14159, "3.14 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (18_720, "5.2 h"),
     (293_760, "3.4 days")],
)  # fmt: skip
def test_format_duration_largest_unit_that_fits_twice(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("std", "text"), [(1.414, "61.00 ± 1.41"), (None, "61.00")])
def test_format_spread_omits_the_deviation_of_a_single_value(std, text):
    assert format_spread(61, std) == text
