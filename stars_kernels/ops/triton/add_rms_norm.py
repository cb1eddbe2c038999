"""add_rms_norm on a GPU: one launch, a program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_kernels.ops.add_rms_norm import add_rms_norm_ref
from stars_kernels.ops.triton._launch import on_device_of
from stars_kernels.ops.triton.rms_norm import BLOCK_D, ELEMENTS_PER_WARP


def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.add_rms_norm`; sums in fp32. float64 runs the definition."""
    if x.dtype == torch.float64:
        return add_rms_norm_ref(x, residual, weight, eps)
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    if x.numel() == 0:
        return total, normed
    size = x.shape[-1]
    block = min(BLOCK_D, triton.next_power_of_2(size))
    with on_device_of(x):
        _add_rms_norm[(x.numel() // size,)](
            x, residual, weight, total, normed, eps,
            SIZE=size, BLOCK=block, num_warps=max(1, block // ELEMENTS_PER_WARP), enable_fp_fusion=True,
        )  # fmt: skip
    return total, normed


@triton.jit
def _add_rms_norm(x, residual, weight, total, normed, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One row. A row longer than BLOCK is added again, rather than read from what was just written."""
    row = tl.program_id(0).to(tl.int64) * SIZE
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        d = start + tl.arange(0, BLOCK)
        value = _sum(x, residual, total, row, d, SIZE)
        tl.store(total + row + d, value, mask=d < SIZE)
        wide = value.to(tl.float32)
        square += wide * wide
    scale = 1 / tl.sqrt(tl.sum(square) / SIZE + eps)
    for start in range(0, SIZE, BLOCK):
        d = start + tl.arange(0, BLOCK)
        value = _sum(x, residual, total, row, d, SIZE).to(tl.float32)
        rounded = (value * scale).to(normed.dtype.element_ty).to(tl.float32)
        factor = tl.load(weight + d, mask=d < SIZE, other=0.0).to(tl.float32)
        tl.store(normed + row + d, (rounded * factor).to(normed.dtype.element_ty), mask=d < SIZE)


@triton.jit
def _sum(x, residual, total, row, d, SIZE: tl.constexpr):
    """residual + x [BLOCK], rounded to their dtype."""
    added = tl.load(x + row + d, mask=d < SIZE, other=0.0).to(tl.float32)
    before = tl.load(residual + row + d, mask=d < SIZE, other=0.0).to(tl.float32)
    return (before + added).to(total.dtype.element_ty)
