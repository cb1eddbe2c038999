"""rms_norm on a GPU: one launch for what transformers does in eight, a program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_kernels.ops.rms_norm import rms_norm_ref
from stars_kernels.ops.triton._launch import on_device_of

BLOCK_D = (
    4096  # elements of a row at a time: a row up to this size is read from memory once, a longer one from L2 again
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
    block = min(BLOCK_D, triton.next_power_of_2(size))
    with on_device_of(x):
        _rms_norm[(x.numel() // size,)](
            x, weight, out, eps,
            SIZE=size, BLOCK=block, num_warps=max(1, block // ELEMENTS_PER_WARP), enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit
def _rms_norm(x, weight, out, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * SIZE
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        d = start + tl.arange(0, BLOCK)
        value = tl.load(x + row + d, mask=d < SIZE, other=0.0).to(tl.float32)
        square += value * value
    scale = 1 / tl.sqrt(tl.sum(square) / SIZE + eps)
    for start in range(0, SIZE, BLOCK):
        d = start + tl.arange(0, BLOCK)
        value = tl.load(x + row + d, mask=d < SIZE, other=0.0).to(tl.float32)
        normed = (value * scale).to(out.dtype.element_ty).to(tl.float32)
        factor = tl.load(weight + d, mask=d < SIZE, other=0.0).to(tl.float32)
        tl.store(out + row + d, (normed * factor).to(out.dtype.element_ty), mask=d < SIZE)
