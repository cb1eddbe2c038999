"""reward_head on a GPU: gather, norm and dot in one launch; each of R rows of D is read once, not R * S."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_kernels.ops.reward_head import reward_head_ref
from stars_kernels.ops.triton._launch import on_device_of

BLOCK_D = 2048  # elements of a row at a time, 16 bytes a load and thread in half precision
NUM_WARPS = 4


def reward_head_triton(
    hidden: Tensor, last: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, eps: float
) -> Tensor:
    """See `ops.reward_head`; sums in fp32. float64 runs the definition."""
    if hidden.dtype == torch.float64:
        return reward_head_ref(hidden, last, weight, bias, norm_weight, eps)
    rows, _, size = hidden.shape
    reward = hidden.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return reward
    hidden = hidden if hidden.stride(2) == 1 else hidden.contiguous()
    weight = weight.contiguous()
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    with on_device_of(hidden):
        _reward_head[(rows,)](
            hidden, last, weight, bias, norm_weight, reward, hidden.stride(0), hidden.stride(1), last.stride(0), eps,
            SIZE=size, BLOCK=min(BLOCK_D, triton.next_power_of_2(size)), num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return reward


@triton.jit(do_not_specialize=["last_row"], do_not_specialize_on_alignment=["last"])
def _reward_head(
    hidden, last, weight, bias, norm_weight, reward, hidden_row, hidden_step, last_row, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: sum and sum of squares in one pass, as the norm is one factor of the dot product."""
    row = tl.program_id(0).to(tl.int64)
    hidden += row * hidden_row + tl.load(last + row * last_row) * hidden_step
    dot = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = d < SIZE
        x = tl.load(hidden + d, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
        if norm_weight is not None:
            square += x * x
            w *= tl.load(norm_weight + d, mask=inside, other=0.0).to(tl.float32)
        dot += x * w
    total = tl.sum(dot)
    if norm_weight is not None:
        total *= tl.rsqrt(tl.sum(square) / SIZE + eps)
    if bias is not None:
        total += tl.load(bias).to(tl.float32)
    tl.store(reward + row, total)
