"""The rising threshold and its calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

UNREACHABLE = 1e300
"""A target no reward meets: with hard acceptance, a segment then falls back to the best of its attempts."""


def start_reward(prompt_reward: float, target: float, alpha: float) -> float:
    """r0 = (1 - alpha) r(x) + alpha r*."""
    return (1 - alpha) * prompt_reward + alpha * target


def threshold(tokens: Tensor, r0: Tensor, target: float, max_new_tokens: int) -> Tensor:
    """tau(n) = min(r*, r0 + n (r* - r0) / max_new_tokens); tokens (the candidate's included) and r0: float64."""
    return (r0 + tokens * (target - r0) / max_new_tokens).clamp(max=target)


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
