"""gated: activation(gate) * up, what stands between the products of a gated MLP.

As transformers has it: the activation is computed in fp32 (float64 in float64) and rounded to the dtype, and so is the
product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stars_kernels.ops.dispatch import call_op
from stars_kernels.ops.registry import define_op
from stars_kernels.ops.validate import check_device, check_dtype, check_shape

ACTIVATIONS = ("silu", "gelu_tanh")


def gated(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    """Return activation(gate) * up, contiguous; gate, up: [.., I] of one float dtype; activation: of ACTIVATIONS."""
    if not gate.is_floating_point() or gate.dim() == 0:
        raise ValueError(f"gate has shape {list(gate.shape)} and dtype {gate.dtype}, expected [.., I] of a float dtype")
    check_shape("up", up, *gate.shape)
    check_dtype("up", up, gate.dtype)
    check_device(gate, up=up)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    return call_op(_NAME, gate, up, activation)


def gated_ref(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The definition."""
    gate, up = gate.contiguous(), up.contiguous()  # torch rounds an element by its place in memory
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def _fake(gate: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


_NAME = define_op("gated(Tensor gate, Tensor up, str activation) -> Tensor", gated_ref, _fake)
