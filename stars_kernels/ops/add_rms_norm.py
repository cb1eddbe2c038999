"""add_rms_norm: a residual and what is added to it, and the `rms_norm` of their sum, in one read of both."""

from __future__ import annotations

import torch
from torch import Tensor

from stars_kernels.ops.dispatch import call_op
from stars_kernels.ops.registry import define_op
from stars_kernels.ops.rms_norm import rms_norm_ref
from stars_kernels.ops.validate import check_device, check_dtype, check_shape


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Return residual + x, rounded to their dtype, and the rms_norm of that.

    Args:
        x, residual: [.., D], D > 0, of one float dtype. weight: [D], any float dtype.

    Returns:
        both [.., D], contiguous.
    """
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {list(x.shape)} and dtype {x.dtype}, expected [.., D], D > 0, of a float dtype")
    check_shape("residual", residual, *x.shape)
    check_dtype("residual", residual, x.dtype)
    check_shape("weight", weight, x.shape[-1])
    check_device(x, residual=residual, weight=weight)
    return call_op(_NAME, x, residual, weight, eps)


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The definition."""
    total = (residual + x).contiguous()
    return total, rms_norm_ref(total, weight, eps)


def _fake(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, torch.empty_like(total)


_NAME = define_op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor total, Tensor normed)",
    add_rms_norm_ref,
    _fake,
)
