"""Calibration: r* and beta from the rewards of plain continuations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.rules import Stars


def is_calibrated(config: StarsConfig) -> bool:
    """Say whether r* and beta are known, as far as the rule has them."""
    rule = config.resolved_rule
    if not isinstance(rule, Stars):
        return True
    return rule.reward_threshold is not None and (rule.beta is not None or rule.accept == "hard")


def calibrate(config: StarsConfig, rewards: Sequence[float]) -> tuple[float, float]:
    """Return r* and beta: as the config has them, or else from the finite rewards of plain continuations."""
    rule = config.resolved_rule
    target, beta = (rule.reward_threshold, rule.beta) if isinstance(rule, Stars) else (None, None)
    if target is None:
        target = calibrate_target(rewards, config.calibration_quantile)
    return target, calibrate_beta(rewards, target, config.calibration_acceptance) if beta is None else beta


def with_target(config: StarsConfig, target: float, beta: float | None) -> StarsConfig:
    """Return the config with r* and beta, where it has none of its own."""
    rule = config.resolved_rule
    assert isinstance(rule, Stars)
    target = target if rule.reward_threshold is None else rule.reward_threshold
    beta_or_none = rule.beta if rule.beta is not None or rule.accept == "hard" else beta
    if config.rule is None:
        return config.replace(reward_threshold=target, beta=beta_or_none)
    return config.replace(rule=replace(rule, reward_threshold=target, beta=beta_or_none))


def calibrate_target(rewards: Sequence[float], quantile: float) -> float:
    """r*: the `quantile` of the rewards of plain continuations."""
    return torch.tensor(rewards, dtype=torch.float64).quantile(quantile).item()


def accepted_share(rewards: Sequence[float], target: float, beta: float) -> float:
    """Return mean(min(1, exp((r - r*) / beta))): the share of these rewards that is expected to be accepted at r*."""
    gaps = torch.tensor(rewards, dtype=torch.float64) - target
    return (gaps / beta).exp().clamp(max=1.0).mean().item()


def calibrate_beta(rewards: Sequence[float], target: float, acceptance: float) -> float:
    """beta such that mean(min(1, exp((r - r*) / beta))), the share of these rewards accepted at r*, is `acceptance`.

    The share grows with beta. Where even the coldest acceptance takes more than that share (many rewards above r*), the
    result is a small share of the rewards' spread.
    """
    gaps = torch.tensor(rewards, dtype=torch.float64) - target
    scale = max(float(gaps.abs().max()), 1e-6)

    low, high = math.log(1e-3), math.log(1e3)  # in units of the largest gap
    for _ in range(60):
        middle = (low + high) / 2
        share = accepted_share(rewards, target, scale * math.exp(middle))
        low, high = (middle, high) if share < acceptance else (low, middle)
    return scale * math.exp((low + high) / 2)
