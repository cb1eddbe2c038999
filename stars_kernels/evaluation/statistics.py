"""Means with intervals over prompts, and a win rate from which the answers' length is taken out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

LEVEL, RESAMPLES, SEED = 0.95, 10_000, 0
"""Of the intervals: how often such an interval holds the true mean, the resamples, and the seed that draws them."""
METHOD = f"{LEVEL:.0%} percentile bootstrap over prompts, {RESAMPLES:,} resamples, seed {SEED}"
BLOCK = 4_000_000
"""Numbers that are resampled at once, at most."""
ENOUGH = 10
"""Pairs, at least, from which the effect of length is estimated."""
STEEP = 15.0
"""A fit with log-odds beyond this has no end: a length, or every pair, tells wins from losses without an exception."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval; low and high are None where there are too few values for one (fewer than two)."""

    mean: float
    low: float | None
    high: float | None


def estimate(values: Any) -> Estimate | None:
    """Return the mean of one value per prompt and its bootstrap interval; None of no values.

    The prompts are resampled with replacement; the interval holds the middle 95 % of the resamples' means. Two lists of
    as many values are resampled alike, so an interval of differences is a paired one.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return None
    if len(values) < 2:
        return Estimate(float(values.mean()), None, None)
    rng, means = np.random.default_rng(SEED), np.empty(RESAMPLES)
    rows = max(1, BLOCK // len(values))
    for start in range(0, RESAMPLES, rows):
        some = means[start : start + rows]  # a view, [rows]
        some[:] = values[rng.integers(0, len(values), (len(some), len(values)), dtype=np.int32)].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


def length_controlled(wins: Any, differences: Any) -> float | None:
    """Return the win rate that is expected where both answers are equally long; None where it cannot be told.

    The probability of a win is fitted as sigmoid(a + b tanh(d / s)), with d the difference of the two lengths, s the
    standard deviation of d, and a and b those of the highest likelihood (by Newton's method; half a win for a tie).
    The result is that probability at d = 0, sigmoid(a). AlpacaEval 2 controls for length in this way, with more terms.

    Args:
        wins: [pairs] of 1 for a win, 0.5 for a tie, 0 for a loss.
        differences: [pairs] of how much longer than its rival the answer is.

    Returns:
        None where there are fewer than 10 pairs, or where the likelihood has no maximum: all differences are equal and
        not 0, or wins and losses are told apart without an exception.
    """
    wins, differences = np.asarray(wins, dtype=np.float64), np.asarray(differences, dtype=np.float64)
    if len(wins) < ENOUGH:
        return None
    if not differences.any():
        return float(wins.mean())
    spread = differences.std()
    if spread == 0:
        return None
    x = np.stack([np.ones(len(wins)), np.tanh(differences / spread)], axis=1)  # [pairs, 2]
    fit = np.zeros(2)  # a, b
    for _ in range(50):
        chances = 1 / (1 + np.exp(-(x @ fit)))
        slope = x.T @ (wins - chances)  # [2]
        if np.abs(slope).max() < 1e-9:
            return float(1 / (1 + np.exp(-fit[0])))
        curvature = (x * (chances * (1 - chances))[:, None]).T @ x  # [2, 2]
        if np.linalg.cond(curvature) > 1e12:
            return None
        fit = fit + np.linalg.solve(curvature, slope)
        if np.abs(x @ fit).max() > STEEP:
            return None
    return None
