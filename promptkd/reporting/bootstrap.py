"""Paired bootstrap over examples: whether two models' scores on a test set differ by more than chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLINGS = 10_000
SEED = 0
_CHUNK = 2_000_000  # drawn examples in memory at once


@dataclass(frozen=True)
class Difference:
    """A model's mean score minus the baseline's."""

    mean: float
    low: float  # bounds of the 95 % interval
    high: float
    p: float  # two-sided p-value of no difference


def paired_bootstrap(model: list[list[float]], baseline: list[list[float]]) -> Difference:
    """Compare two models' scores on the same examples.

    The interval holds the middle 95 % of the mean differences of resampled examples. The p-value is the share of
    resamplings whose deviation from the observed mean is at least as large as that mean: the resamplings' own
    distribution, moved to no difference (Efron and Tibshirani 1993, section 16.4). The observed mean counts as one
    resampling, so that p is 1 for equal systems and never 0. The same input gives the same numbers.

    Args:
        model: Scores `[seed][example]`. The score of an example is its mean over the seeds.
        baseline: Scores of the other model on the same examples.
    """
    scores = [np.asarray(rows, dtype=np.float64).mean(0) for rows in (model, baseline)]
    differences = scores[0] - scores[1]
    mean, count = float(differences.mean()), len(differences)
    generator, means = np.random.default_rng(SEED), np.empty(RESAMPLINGS)
    step = max(1, _CHUNK // count)
    for first in range(0, RESAMPLINGS, step):
        part = means[first : first + step]
        part[:] = differences[generator.integers(0, count, (len(part), count))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    rounding = 1e-12 * (1 + abs(mean))
    as_far = int((np.abs(means - mean) >= abs(mean) - rounding).sum())
    return Difference(mean, float(low), float(high), (as_far + 1) / (RESAMPLINGS + 1))
