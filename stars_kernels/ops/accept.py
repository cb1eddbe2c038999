"""accept: judge a round's attempts in order, as the sequential algorithm would (arXiv 2511.03827).

Attempt a is accepted iff u(a) < min(1, exp((reward - tau) / beta)) (hard: reward >= tau). The first accepted wins;
after `max_attempts` without one, the best reward of all rounds is taken (the fallback).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stars_kernels.ops.dispatch import call_op
from stars_kernels.ops.philox import MAX_ATTEMPTS, accept_uniform
from stars_kernels.ops.registry import define_op
from stars_kernels.ops.validate import check_device, check_dtype, check_shape

RETRY, ACCEPTED, FALLBACK, NAN = 0, 1, 2, 3


def accept(
    rewards: Tensor,
    valid: Tensor,
    thresholds: Tensor,
    keys: Tensor,
    position: Tensor,
    first_attempt: Tensor,
    best_reward: Tensor,
    best_attempt: Tensor,
    *,
    max_attempts: int,
    beta: float,
    hard: bool = False,
) -> tuple[Tensor, Tensor]:
    """Judge columns left to right, a column being attempt first_attempt + column; the arithmetic is float64.

    Args:
        rewards: [P, W] float32 or float64. valid: [P, W] bool, other columns do not exist. thresholds: [P, W] float64.
        keys, position, first_attempt: [P] int64; position is the answer's length where the segment starts, and
            first_attempt is less than max_attempts.
        best_reward: [P] float64 and best_attempt: [P] int64 (-1 = none), the best rejected so far; updated in place.
        beta: acceptance temperature in the RM's units, > 0 (not used when hard).

    Returns:
        chosen [P] int64: the accepted column, the one that became the best in this call, the NaN one, or -1;
        outcome [P] int64: RETRY, ACCEPTED, FALLBACK (attempt max_attempts - 1 was rejected), or NAN (a reward is).
    """
    check_shape("rewards", rewards, None, None)
    prompts, width = rewards.shape
    check_dtype("rewards", rewards, torch.float32, torch.float64)
    check_shape("valid", valid, prompts, width)
    check_dtype("valid", valid, torch.bool)
    check_shape("thresholds", thresholds, prompts, width)
    check_dtype("thresholds", thresholds, torch.float64)
    for name, tensor in (
        ("keys", keys), ("position", position), ("first_attempt", first_attempt), ("best_attempt", best_attempt),
    ):  # fmt: skip
        check_shape(name, tensor, prompts)
        check_dtype(name, tensor, torch.int64)
    check_shape("best_reward", best_reward, prompts)
    check_dtype("best_reward", best_reward, torch.float64)
    check_device(
        rewards, valid=valid, thresholds=thresholds, keys=keys, position=position, first_attempt=first_attempt,
        best_reward=best_reward, best_attempt=best_attempt,
    )  # fmt: skip
    if not hard and not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta is {beta}, expected a finite number > 0")
    if not 1 <= max_attempts <= MAX_ATTEMPTS:
        raise ValueError(f"max_attempts is {max_attempts}, expected 1 to {MAX_ATTEMPTS}")
    return call_op(
        _NAME, rewards, valid, thresholds, beta, hard, keys, position, first_attempt, max_attempts, best_reward,
        best_attempt,
    )  # fmt: skip


def accept_ref(
    rewards: Tensor, valid: Tensor, thresholds: Tensor, beta: float, hard: bool, keys: Tensor, position: Tensor,
    first_attempt: Tensor, max_attempts: int, best_reward: Tensor, best_attempt: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition: all prompts at once, one column at a time."""
    rewards = rewards.double()
    outcome = torch.full_like(first_attempt, RETRY)
    chosen = torch.full_like(first_attempt, -1)
    for column in range(rewards.shape[1]):
        reward, tau = rewards[:, column], thresholds[:, column]
        attempt = first_attempt + column
        judged = valid[:, column] & (outcome == RETRY)
        broken = judged & reward.isnan()
        if hard:
            accepted = judged & (reward >= tau)
        else:
            u = accept_uniform(keys, position, attempt)
            accepted = judged & (u < ((reward - tau) / beta).exp().clamp(max=1.0))
        better = judged & ~accepted & ~broken & ((best_attempt < 0) | (reward > best_reward))
        best_reward.copy_(reward.where(better, best_reward))
        best_attempt.copy_(attempt.where(better, best_attempt))
        chosen = chosen.masked_fill(broken | accepted | better, column)
        outcome = outcome.masked_fill(judged & (attempt == max_attempts - 1), FALLBACK)
        outcome = outcome.masked_fill(accepted, ACCEPTED).masked_fill(broken, NAN)
    return chosen, outcome


def _fake(rewards: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    per_prompt = rewards.new_empty(rewards.shape[0], dtype=torch.int64)
    return per_prompt, torch.empty_like(per_prompt)


_NAME = define_op(
    "accept(Tensor rewards, Tensor valid, Tensor thresholds, float beta, bool hard, Tensor keys, Tensor position, "
    "Tensor first_attempt, int max_attempts, Tensor(a!) best_reward, Tensor(b!) best_attempt) "
    "-> (Tensor chosen, Tensor outcome)",
    accept_ref,
    _fake,
)
