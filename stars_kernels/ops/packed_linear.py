"""packed_linear: a linear layer on weights packed once, for the few rows of a decoding step.

    packed[n // 16, k, n % 16] = weight[n, k]

The weights are read once, as one stream, for all rows. Each output is one sum over k in ascending order, so on a CPU a
row's bits do not depend on the rows beside it: in fp32 an answer is the same whatever the width or the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stars_kernels.ops._registry import call_op, define_op
from stars_kernels.ops._validate import check_device, check_dtype, check_shape

PANEL = 16
"""Outputs side by side in packed weights: a cache line of fp32, as in csrc/packed_linear.h."""
WEIGHT_DTYPES = (torch.float32, torch.bfloat16)


def pack_linear(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """weight [N, K] -> packed [ceil(N / PANEL), K, PANEL] in `dtype` (of `weight` where None), missing outputs zero."""
    check_shape("weight", weight, None, None)
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight would be packed as {dtype}, expected one of {WEIGHT_DTYPES}")
    outputs = weight.shape[0]
    padded = F.pad(weight.to(dtype), (0, 0, 0, -outputs % PANEL))
    return padded.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def packed_linear(x: Tensor, weight: Tensor, columns: int, *, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias, with sums in fp32.

    Args:
        x: [.., K] float32. weight: [ceil(N / PANEL), K, PANEL] of `pack_linear`, float32 or bfloat16.
        columns: N. bias: [N] float32 or None.

    Returns:
        [.., N] float32.
    """
    check_dtype("x", x, torch.float32)
    check_shape("weight", weight, -(-columns // PANEL), x.shape[-1], PANEL)
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight has dtype {weight.dtype}, expected one of {WEIGHT_DTYPES}")
    if bias is not None:
        check_shape("bias", bias, columns)
        check_dtype("bias", bias, torch.float32)
    check_device(x, weight=weight, bias=bias)
    return call_op(_NAME, x, weight, columns, bias)


def packed_linear_ref(x: Tensor, weight: Tensor, columns: int, bias: Tensor | None) -> Tensor:
    """The definition."""
    rows = weight.transpose(1, 2).flatten(0, 1)[:columns]  # [N, K]
    return F.linear(x, rows.float(), bias)


def _fake(x: Tensor, weight: Tensor, columns: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns)


_NAME = define_op(
    "packed_linear(Tensor x, Tensor weight, int columns, Tensor? bias) -> Tensor", packed_linear_ref, _fake
)
