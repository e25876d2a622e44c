"""The bootstrap for numbers that are no plain mean of cases: a ratio of sums, a distance of two samples (Efron and Tibshirani 1993)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from unidiff.evaluation.report import Z95, Estimate

Statistic = Callable[..., float]
"""A number of samples, each given by the indices of its cases, int64 `[n]`."""


def bootstrap(sizes: Sequence[int], statistic: Statistic, resamples: int, seed: int, key: str) -> np.ndarray:
    """The statistic of samples drawn with replacement, float64 `[resamples]`.

    Args:
        sizes: number of cases of each sample, which are drawn apart. seed, key: of the draws.

    Raises:
        ValueError: fewer than 2 resamples, or more than 10,000,000.
    """
    if not 2 <= resamples <= 10**7:
        raise ValueError(f"resamples is {resamples}; expected 2 to 10,000,000")
    rng = np.random.default_rng([seed % 2**64, *key.encode()])
    return np.array([statistic(*(rng.integers(n, size=n) for n in sizes)) for _ in range(resamples)])


def percentile_interval(value: float, draws: np.ndarray, n: int) -> Estimate:
    """The middle 95 % of the draws, widened where it must be to hold the value itself."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(value, min(float(low), value), max(float(high), value), n)


def spread_interval(value: float, deviation: float, n: int, least: float = -np.inf) -> Estimate:
    """value +- 1.96 standard deviations: for numbers whose draws lie beside the value, as those of a biased distance do."""
    return Estimate(value, max(least, value - Z95 * deviation), value + Z95 * deviation, n)
