"""rms_norm: x / sqrt(mean(x^2) + eps) * weight over the last dimension, one read of x.

As LlamaRMSNorm has it: the normed x is rounded to its dtype before it is multiplied by the weight, and so is the
product. In fp32 and float64 the first rounding changes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stars_kernels.ops.dispatch import call_op
from stars_kernels.ops.registry import define_op
from stars_kernels.ops.validate import check_device, check_shape


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x: [.., D], any float dtype; weight: [D], any. The arithmetic is fp32 (fp64 for float64); returns x's dtype."""
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {list(x.shape)} and dtype {x.dtype}, expected [.., D], D > 0, of a float dtype")
    check_shape("weight", weight, x.shape[-1])
    check_device(x, weight=weight)
    return call_op(_NAME, x, weight, eps)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = F.rms_norm(wide, weight.shape, None, eps).to(x.dtype)
    return (normed.to(wide.dtype) * weight.to(wide.dtype)).to(x.dtype).contiguous()


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_NAME = define_op("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm_ref, _fake)
