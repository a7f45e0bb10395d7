"""Paired bootstrap over examples: is one model's score on a test set above another's, beyond the choice of examples?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLED = 10_000  # times the examples are drawn anew
SEED = 0
_CHUNK = 2_000_000  # drawn examples in memory at once


@dataclass(frozen=True)
class Difference:
    """mean: the model's minus the baseline's; low, high: 95 % interval; p: two-sided, of no difference."""

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(model: list[list[float]], baseline: list[list[float]]) -> Difference:
    """Compare two models' scores on the same examples, `[seed][example]` each; an example's score is its seeds' mean.

    The interval holds the middle 95 % of the mean differences of resampled examples. The p-value is the share of
    resamplings whose deviation from the observed mean is at least as large as that mean (the resampling's own
    distribution moved to no difference; Efron and Tibshirani 1993, section 16.4), the observed one counted in: it is
    1 for equal systems and never 0. The same input gives the same numbers.
    """
    scores = [np.asarray(rows, dtype=np.float64).mean(0) for rows in (model, baseline)]
    differences = scores[0] - scores[1]
    mean, count = float(differences.mean()), len(differences)
    generator, means = np.random.default_rng(SEED), np.empty(RESAMPLED)
    step = max(1, _CHUNK // count)
    for first in range(0, RESAMPLED, step):
        part = means[first : first + step]
        part[:] = differences[generator.integers(0, count, (len(part), count))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    rounding = 1e-12 * (1 + abs(mean))
    as_far = int((np.abs(means - mean) >= abs(mean) - rounding).sum())
    return Difference(mean, float(low), float(high), (as_far + 1) / (RESAMPLED + 1))
