"""Calibration: r* and beta from the rewards of plain continuations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def calibrate_target(rewards: Sequence[float], quantile: float) -> float:
    """r*: the `quantile` of the rewards of plain continuations."""
    return torch.tensor(rewards, dtype=torch.float64).quantile(quantile).item()


def calibrate_beta(rewards: Sequence[float], target: float, acceptance: float) -> float:
    """beta such that mean(min(1, exp((r - r*) / beta))), the share of these rewards accepted at r*, is `acceptance`.

    The share grows with beta. Where even the coldest acceptance takes more than that share (many rewards above r*), the
    result is a small share of the rewards' spread.
    """
    gaps = torch.tensor(rewards, dtype=torch.float64) - target
    scale = max(float(gaps.abs().max()), 1e-6)

    def share(log_beta: float) -> float:
        return (gaps / (scale * math.exp(log_beta))).exp().clamp(max=1.0).mean().item()

    low, high = math.log(1e-3), math.log(1e3)  # in units of the largest gap
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < acceptance else (low, middle)
    return scale * math.exp((low + high) / 2)
