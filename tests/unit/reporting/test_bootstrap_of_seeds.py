"""The bootstrap over seeds and examples, and Holm's correction, against plain computations."""

from __future__ import annotations

import numpy as np
import pytest

from promptkd.reporting.bootstrap import hierarchical_bootstrap, holm


def scores(seeds: int, examples: int, shift: float, spread: float, number: int) -> list[list[float]]:
    """Return scores with a deviation for each seed and noise for each example."""
    generator = np.random.default_rng(number)
    levels = shift + spread * generator.normal(size=(seeds, 1))
    return (levels + 10 * generator.normal(size=(seeds, examples))).tolist()


def enlarged(rows: list[list[float]]) -> list[list[float]]:
    """Return the scores with seeds whose mean of n draws varies as much as their mean does."""
    mean, factor = np.mean(rows), (len(rows) / (len(rows) - 1)) ** 0.5
    return [[score + (factor - 1) * (np.mean(row) - mean) for score in row] for row in rows]


def test_hierarchical_bootstrap_equals_plain_resampling():
    model, baseline = scores(5, 40, 1.0, 1.5, 1), scores(3, 40, 0.0, 1.5, 2)
    generator, means = np.random.default_rng(5), []
    larger = enlarged(model), enlarged(baseline)
    for _ in range(6000):
        examples = generator.integers(0, 40, 40)
        drawn = [[rows[i] for i in generator.integers(0, len(rows), len(rows))] for rows in larger]
        means.append(np.subtract(*(np.mean([[row[e] for e in examples] for row in rows]) for rows in drawn)))
    found = hierarchical_bootstrap(model, baseline)
    assert found.mean == pytest.approx(np.mean(model) - np.mean(baseline))
    low, high = np.percentile(means, [2.5, 97.5])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.3), pytest.approx(high, abs=0.3))
    p = np.mean(np.abs(np.array(means) - found.mean) >= abs(found.mean))
    assert found.p == pytest.approx(p, abs=0.03) and 0.01 < found.p < 0.99


def test_hierarchical_bootstrap_counts_the_seeds_not_only_the_examples():
    many = np.zeros((2, 1000))
    many[0] += 2.0  # one seed of two is better: the examples agree, the seeds do not
    found = hierarchical_bootstrap(many.tolist(), np.zeros((2, 1000)).tolist())
    assert (found.low, found.high) == (pytest.approx(1 - 2**0.5), pytest.approx(1 + 2**0.5)) and found.p > 0.3
    assert hierarchical_bootstrap([[1.0] * 9] * 5, [[0.0] * 9] * 5).p == pytest.approx(1 / 10_001)


def test_holm_equals_its_definition():
    p = [0.01, 0.04, 0.03, 0.005, 0.6]
    # Ascending: 0.005 x 5, 0.01 x 4, 0.03 x 3, 0.04 x 2, 0.6 x 1, and never below the one before.
    assert holm(p) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.6])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
