"""RMS norms as one op."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from stars_kernels import ops
from stars_kernels.hf.view.rewrites.matching import works_as

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a LlamaRMSNorm, or another family's that does the same, and no float64."""
    return works_as(module, LlamaRMSNorm) and module.weight.dtype in DTYPES


class RMSNorm(nn.Module):
    """A module that `is_norm`, in one op where its input has the weight's dtype.

    LlamaRMSNorm computes in fp32, also of float64, where the op has float64.
    """

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:  # then the result has the wider one
            return self.weight * ops.call_op("rms_norm", x, torch.ones_like(self.weight), self.eps)
        return ops.call_op("rms_norm", x, self.weight, self.eps)
