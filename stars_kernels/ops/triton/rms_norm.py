"""rms_norm on a GPU: one launch for what transformers does in eight, a program a row, or a few short ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_kernels.ops.rms_norm import rms_norm_ref
from stars_kernels.ops.triton._launch import on_device_of

BLOCK_D = (
    4096  # elements of a row at a time: up to this size a row is read from memory once, a longer one from L2 again
)
ELEMENTS_PER_WARP = 512  # 16 bytes a load and thread in half precision, twice


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.rms_norm`; sums in fp32. float64 runs the definition."""
    if x.dtype == torch.float64:
        return rms_norm_ref(x, weight, eps)
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    size = x.shape[-1]
    count, block = x.numel() // size, min(BLOCK_D, triton.next_power_of_2(size))
    rows = max(1, ELEMENTS_PER_WARP // block)  # of a program, so that loads of short ones are wide too
    with on_device_of(x):
        _rms_norm[(triton.cdiv(count, rows),)](
            x, weight, out, eps, count,
            SIZE=size, BLOCK=block, ROWS=rows, num_warps=max(1, block // ELEMENTS_PER_WARP), enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["count"])
def _rms_norm(x, weight, out, eps, count, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows, a part of BLOCK at a time."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, there = r[:, None] * SIZE, (r < count)[:, None]
    square = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        d = start + tl.arange(0, BLOCK)[None, :]
        value = tl.load(x + row + d, mask=there & (d < SIZE), other=0.0).to(tl.float32)
        square += value * value
    scale = 1 / tl.sqrt(tl.sum(square, axis=1) / SIZE + eps)
    for start in range(0, SIZE, BLOCK):
        d = start + tl.arange(0, BLOCK)[None, :]
        value = tl.load(x + row + d, mask=there & (d < SIZE), other=0.0).to(tl.float32)
        normed = (value * scale[:, None]).to(out.dtype.element_ty).to(tl.float32)
        # For each row again, so that these loads are laid out, and as wide, as those of x.
        factor = tl.load(weight + d + 0 * row, mask=there & (d < SIZE), other=0.0).to(tl.float32)
        tl.store(out + row + d, (normed * factor).to(out.dtype.element_ty), mask=there & (d < SIZE))
