"""reward_head: the reward of each row, read at its last token: R rows are read, not R * S."""

from __future__ import annotations

import torch
from torch import Tensor

from stars_kernels.ops.dispatch import call_op
from stars_kernels.ops.registry import define_op
from stars_kernels.ops.validate import check_device, check_dtype, check_shape


def reward_head(
    hidden: Tensor,
    last: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Compute reward[r] = weight . norm(hidden[r, last[r]]) + bias.

    Args:
        hidden: [R, S, D], any float dtype. last: [R] int64, the index of each row's last token, >= 0.
        weight: [D]. bias: [1] or None. norm_weight: [D] of an RMSNorm with `eps` before the head, or None.

    Returns:
        [R]: float64 for float64 input, else float32.
    """
    check_shape("hidden", hidden, None, None, None)
    if not hidden.is_floating_point():
        raise ValueError(f"hidden has dtype {hidden.dtype}, expected a float dtype")
    check_shape("last", last, hidden.shape[0])
    check_dtype("last", last, torch.int64)
    check_shape("weight", weight, hidden.shape[2])
    if bias is not None:
        check_shape("bias", bias, 1)
    if norm_weight is not None:
        check_shape("norm_weight", norm_weight, hidden.shape[2])
    check_device(hidden, last=last, weight=weight, bias=bias, norm_weight=norm_weight)
    return call_op(_NAME, hidden, last, weight, bias, norm_weight, eps)


def reward_head_ref(
    hidden: Tensor, last: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, eps: float
) -> Tensor:
    """The definition."""
    rows = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]  # [R, D]
    rows = rows.to(_accumulate(rows))
    if norm_weight is not None:
        rows = rows * torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + eps) * norm_weight.to(rows.dtype)
    reward = rows @ weight.to(rows.dtype)
    return reward if bias is None else reward + bias.to(rows.dtype)


def _accumulate(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _fake(hidden: Tensor, *rest: object) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=_accumulate(hidden))


_NAME = define_op(
    "reward_head(Tensor hidden, Tensor last, Tensor weight, Tensor? bias, Tensor? norm_weight, float eps) -> Tensor",
    reward_head_ref,
    _fake,
)
