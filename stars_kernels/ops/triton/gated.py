"""gated on a GPU: one launch for two, a program a stretch of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_kernels.ops.gated import gated_ref
from stars_kernels.ops.triton._launch import on_device_of

BLOCK = 1024  # elements of a program
KAPPA = tl.constexpr(0.044715)
BETA = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)


def gated_triton(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See `ops.gated`. float64 runs the definition."""
    if gate.dtype == torch.float64:
        return gated_ref(gate, up, activation)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    gate, up = _rows(gate), _rows(up)
    rows, size = gate.shape
    with on_device_of(gate):
        _gated[(rows, triton.cdiv(size, BLOCK))](
            gate, up, out, gate.stride(0), up.stride(0), size,
            SILU=activation == "silu", BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    """[.., I] -> [N, I] with dense rows, which may be parts of longer ones; mostly without a copy."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


@triton.jit
def _gated(gate, up, out, gate_stride, up_stride, size, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(gate + row * gate_stride + i, mask=i < size, other=0.0).to(tl.float32)
    if SILU:
        active = x / (1 + tl.exp(-x))
    else:
        inner = BETA * (x + KAPPA * x * x * x)
        active = x / (1 + tl.exp(-2 * inner))  # x / 2 * (1 + tanh(inner))
    dtype = out.dtype.element_ty
    factor = tl.load(up + row * up_stride + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(out + row * size + i, (active.to(dtype).to(tl.float32) * factor).to(dtype), mask=i < size)
