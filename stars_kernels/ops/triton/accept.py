"""accept on a GPU without the CUDA C++ kernel: one launch, a lane a prompt, the definition's columns one by one.

The arithmetic is the definition's, in float64 and IEEE throughout but for exp, which is the device's own as in torch. A
float argument of a Triton kernel is fp32, so `beta` goes in as the bits of its float64.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_kernels.ops.accept import ACCEPTED, FALLBACK, NAN, RETRY
from stars_kernels.ops.triton._launch import on_device_of
from stars_kernels.ops.triton.philox import accept_uniform

BLOCK = 32  # prompts of a program, one a lane
OUTCOME_RETRY, OUTCOME_ACCEPTED = tl.constexpr(RETRY), tl.constexpr(ACCEPTED)
OUTCOME_FALLBACK, OUTCOME_NAN = tl.constexpr(FALLBACK), tl.constexpr(NAN)


def accept_triton(
    rewards: Tensor, valid: Tensor, thresholds: Tensor, beta: float, hard: bool, keys: Tensor, position: Tensor,
    first_attempt: Tensor, max_attempts: int, best_reward: Tensor, best_attempt: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `ops.accept`."""
    prompts, width = rewards.shape
    chosen, outcome = (torch.empty_like(keys, memory_format=torch.contiguous_format) for _ in range(2))
    if prompts == 0:
        return chosen, outcome
    rewards, valid, thresholds, keys, position, first_attempt = (
        t.contiguous() for t in (rewards, valid, thresholds, keys, position, first_attempt)
    )
    (beta_bits,) = struct.unpack("<q", struct.pack("<d", beta))
    with on_device_of(keys):
        _accept[(triton.cdiv(prompts, BLOCK),)](
            rewards, valid, thresholds, keys, position, first_attempt, best_reward, best_attempt, chosen, outcome,
            best_reward.stride(0), best_attempt.stride(0), prompts, width, max_attempts, beta_bits,
            HARD=hard, BLOCK=BLOCK, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return chosen, outcome


@triton.jit(
    do_not_specialize=["best_reward_stride", "best_attempt_stride", "prompts", "width", "max_attempts", "beta_bits"],
    do_not_specialize_on_alignment=[
        "rewards", "valid", "thresholds", "keys", "position", "first_attempt", "best_reward", "best_attempt",
        "chosen", "outcome",
    ],
)  # fmt: skip
def _accept(
    rewards, valid, thresholds, keys, position, first_attempt, best_reward, best_attempt, chosen, outcome,
    best_reward_stride, best_attempt_stride, prompts, width, max_attempts, beta_bits,
    HARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK prompts; their running bests are read and written."""
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = p < prompts
    beta = beta_bits.to(tl.int64).to(tl.float64, bitcast=True)
    key, place = tl.load(keys + p, mask=there, other=0), tl.load(position + p, mask=there, other=0)
    first = tl.load(first_attempt + p, mask=there, other=0)
    best_reward += p * best_reward_stride
    best_attempt += p * best_attempt_stride
    best, number = tl.load(best_reward, mask=there, other=0.0), tl.load(best_attempt, mask=there, other=0)
    picked = tl.full([BLOCK], -1, tl.int64)
    state = tl.full([BLOCK], OUTCOME_RETRY, tl.int64)
    for column in range(width):
        at = p * width + column
        judged = tl.load(valid + at, mask=there, other=0).to(tl.int1) & (state == OUTCOME_RETRY)
        reward = tl.load(rewards + at, mask=there, other=0.0).to(tl.float64)
        tau = tl.load(thresholds + at, mask=there, other=0.0)
        attempt = first + column
        broken = judged & (reward != reward)
        if HARD:
            accepted = judged & (reward >= tau)
        else:  # u < 1, so min(1, exp(..)) needs no min
            accepted = judged & (accept_uniform(key, place, attempt) < tl.exp((reward - tau) / beta))
        rejected = judged & (accepted == 0) & (broken == 0)
        better = rejected & ((number < 0) | (reward > best))  # a tie stays with the lower attempt
        best = tl.where(better, reward, best)
        number = tl.where(better, attempt, number)
        picked = tl.where(broken | accepted | better, column, picked)
        state = tl.where(rejected & (attempt == max_attempts - 1), OUTCOME_FALLBACK, state)
        state = tl.where(accepted, OUTCOME_ACCEPTED, tl.where(broken, OUTCOME_NAN, state))
    tl.store(best_reward, best, mask=there)
    tl.store(best_attempt, number, mask=there)
    tl.store(chosen + p, picked, mask=there)
    tl.store(outcome + p, state, mask=there)
