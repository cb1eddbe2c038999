"""Gated MLPs on a GPU: the activation and its product with the other half are one op, and so is the last product with
the residual that it is added to."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh
from transformers.models.llama.modeling_llama import LlamaMLP

from stars_kernels import ops
from stars_kernels.hf.view.rewrites.matching import is_plain, works_as
from stars_kernels.hf.view.rewrites.packed import SILU

GELU_TANH = {GELUTanh}


def is_gated(module: nn.Module) -> TypeGuard[LlamaMLP]:
    """Return whether a module is a LlamaMLP on a GPU, or another family's that does the same."""
    if not works_as(module, LlamaMLP) or _activation(module.act_fn) is None:
        return False
    weight = getattr(module.gate_proj, "weight", None)
    return isinstance(weight, Tensor) and fuses(weight)


def fuses(weight: Tensor) -> bool:
    """Say whether layers of such weights are fused: a CPU has faster ones (`packed`)."""
    return weight.is_cuda


def _activation(module: nn.Module) -> str | None:
    for kinds, name in ((SILU, "silu"), (GELU_TANH, "gelu_tanh")):
        if type(module) in kinds and is_plain(module, type(module)):
            return name
    return None


class GatedMLP(nn.Module):
    """A module that `is_gated`."""

    def __init__(self, mlp: LlamaMLP) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.activation = _activation(mlp.act_fn)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x, residual: [.., D]; the residual is added to the result."""
        inner = ops.call_op("gated", self.gate_proj(x), self.up_proj(x), self.activation)
        down = self.down_proj
        if residual is None:
            return down(inner)
        if not is_plain(down, nn.Linear) or type(down.weight) is not nn.Parameter or down.bias is not None:
            return residual + down(inner)
        return torch.addmm(residual.flatten(0, -2), inner.flatten(0, -2), down.weight.T).view(residual.shape)
