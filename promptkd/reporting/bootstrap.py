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

    def cells(self, digits: int = 2) -> list[str]:
        """Format the mean, the interval and the p-value for a table."""
        p = "< 0.001" if self.p < 0.001 else f"{self.p:.3f}"
        return [f"{self.mean:+.{digits}f}", f"{self.low:+.{digits}f} to {self.high:+.{digits}f}", p]


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
    return _difference(mean, means)


def hierarchical_bootstrap(model: list[list[float]], baseline: list[list[float]]) -> Difference:
    """Compare two methods by the scores of several training runs of each on the same examples.

    A resampling draws training seeds of each method with replacement, independently of each other, and examples, the
    same for both methods. Interval and p-value are as in `paired_bootstrap`. The mean of n drawn seeds has only
    (n - 1) / n of the variance that the mean of n seeds has. Each seed's deviation from the method's mean is enlarged
    accordingly.

    Args:
        model: Scores `[training seed][example]`.
        baseline: Scores of the other method. It may have another number of seeds.
    """
    left, right = (_enlarged(np.asarray(rows, dtype=np.float64)) for rows in (model, baseline))
    examples = left.shape[1]
    generator, means = np.random.default_rng(SEED), np.empty(RESAMPLINGS)
    step = max(1, _CHUNK // examples)
    for first in range(0, RESAMPLINGS, step):
        count = len(means[first : first + step])
        weights = [_weights(generator, count, size) for size in (len(left), len(right), examples)]
        means[first : first + step] = ((weights[0] @ left - weights[1] @ right) * weights[2]).sum(1)
    return _difference(float(left.mean() - right.mean()), means)


def _enlarged(scores: np.ndarray) -> np.ndarray:
    """Move each seed's scores so that the seeds' mean scores are sqrt(n / (n - 1)) as far from their mean."""
    count, deviations = len(scores), scores.mean(1, keepdims=True) - scores.mean()
    return scores if count == 1 else scores + (np.sqrt(count / (count - 1)) - 1) * deviations


def holm(p_values: list[float]) -> list[float]:
    """Correct p-values for their number (Holm 1979): below 0.05, one false finding in 20 families of comparisons."""
    count, largest = len(p_values), 0.0
    corrected = [0.0] * count
    for place, index in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (count - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def _weights(generator: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Return how often each of `size` items is drawn in `size` draws, as shares, for `count` resamplings."""
    return generator.multinomial(size, np.full(size, 1 / size), count) / size


def _difference(mean: float, means: np.ndarray) -> Difference:
    """Return the observed mean with the interval and the p-value of resampled means."""
    low, high = np.percentile(means, [2.5, 97.5])
    rounding = 1e-12 * (1 + abs(mean))
    as_far = int((np.abs(means - mean) >= abs(mean) - rounding).sum())
    return Difference(mean, float(low), float(high), (as_far + 1) / (RESAMPLINGS + 1))
