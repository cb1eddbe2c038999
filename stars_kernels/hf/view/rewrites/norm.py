"""RMS norms as one op."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from stars_kernels import ops
from stars_kernels.hf.view.rewrites.matching import works_as


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a LlamaRMSNorm, or another family's that does the same, in fp32."""
    return works_as(module, LlamaRMSNorm) and module.weight.dtype == torch.float32


class RMSNorm(nn.Module):
    """A module that `is_norm`, in one op; in float64 and half precision it would round otherwise than LlamaRMSNorm."""

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return ops.call_op("rms_norm", x, self.weight, self.eps)
