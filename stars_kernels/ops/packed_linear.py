"""packed_linear, packed_swiglu: linear layers on weights packed once, for the few rows of a decoding step.

    packed[n // 16, k, n % 16] = weight[n, k]

The weights are read once, as one stream, for all rows. Each output is one sum over k in ascending order, so on a CPU a
row's bits do not depend on the rows beside it: docs/exactness.md says for which models an answer's do not either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stars_kernels.ops.dispatch import call_op
from stars_kernels.ops.registry import define_op
from stars_kernels.ops.validate import check_device, check_dtype, check_shape

PANEL = 16
"""Outputs side by side in packed weights: a cache line of fp32, as in csrc/packed_linear.h."""
WEIGHT_DTYPES = (torch.float32, torch.bfloat16)


def pack_linear(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Pack weight [N, K] -> [ceil(N / PANEL), K, PANEL] in `dtype` (of `weight` where None), missing outputs zero."""
    check_shape("weight", weight, None, None)
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight would be packed as {dtype}, expected one of {WEIGHT_DTYPES}")
    outputs = weight.shape[0]
    padded = F.pad(weight.to(dtype), (0, 0, 0, -outputs % PANEL))
    return padded.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def packed_linear(x: Tensor, weight: Tensor, columns: int, *, bias: Tensor | None = None) -> Tensor:
    """Compute y = x W^T + bias, with sums in fp32.

    Args:
        x: [.., K] float32. weight: [ceil(N / PANEL), K, PANEL] of `pack_linear`, float32 or bfloat16.
        columns: N. bias: [N] float32 or None.

    Returns:
        [.., N] float32.
    """
    check_dtype("x", x, torch.float32)
    _check_weight("weight", weight, columns, x)
    if bias is not None:
        check_shape("bias", bias, columns)
        check_dtype("bias", bias, torch.float32)
    check_device(x, weight=weight, bias=bias)
    return call_op(_LINEAR, x, weight, columns, bias)


def packed_swiglu(x: Tensor, gate: Tensor, up: Tensor, columns: int) -> Tensor:
    """Compute y = silu(x gate^T) * (x up^T), the first half of a Llama MLP, with sums in fp32.

    Args:
        x: [.., K] float32. gate, up: [ceil(N / PANEL), K, PANEL] of `pack_linear`, of one dtype. columns: N.

    Returns:
        [.., N] float32.
    """
    check_dtype("x", x, torch.float32)
    _check_weight("gate", gate, columns, x)
    _check_weight("up", up, columns, x)
    check_dtype("up", up, gate.dtype)
    check_device(x, gate=gate, up=up)
    return call_op(_SWIGLU, x, gate, up, columns)


def _check_weight(name: str, weight: Tensor, columns: int, x: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0 or columns <= 0:
        raise ValueError(f"x has shape {list(x.shape)} and {columns=}, expected [.., K], K > 0, and columns > 0")
    check_shape(name, weight, -(-columns // PANEL), x.shape[-1], PANEL)
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name} has dtype {weight.dtype}, expected one of {WEIGHT_DTYPES}")


def packed_linear_ref(x: Tensor, weight: Tensor, columns: int, bias: Tensor | None) -> Tensor:
    """The definition."""
    rows = weight.transpose(1, 2).flatten(0, 1)[:columns]  # [N, K]
    return F.linear(x, rows.float(), bias)


def packed_swiglu_ref(x: Tensor, gate: Tensor, up: Tensor, columns: int) -> Tensor:
    """The definition."""
    return F.silu(packed_linear_ref(x, gate, columns, None)) * packed_linear_ref(x, up, columns, None)


def _fake_linear(x: Tensor, weight: Tensor, columns: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns)


def _fake_swiglu(x: Tensor, gate: Tensor, up: Tensor, columns: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns)


_LINEAR = define_op(
    "packed_linear(Tensor x, Tensor weight, int columns, Tensor? bias) -> Tensor", packed_linear_ref, _fake_linear
)
_SWIGLU = define_op(
    "packed_swiglu(Tensor x, Tensor gate, Tensor up, int columns) -> Tensor", packed_swiglu_ref, _fake_swiglu
)
