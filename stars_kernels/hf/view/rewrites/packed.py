"""Linear layers on packed weights (`ops.packed_linear`): faster on a CPU where rows are few, and row by row to the bit.

They cost a second copy of the weights beside the originals, kept for as long as these live and shared by all views of
them. A packed layer keeps its original weight, which the model's code may read by itself: for its dtype, or for a
product of its own. Every call of `pack` reads the weights once and packs those anew that have changed since, whatever
changed them (`ops.content_hash`): a write through `.data` or NumPy leaves no other trace. Changes during a call are
seen by the next.
"""

from __future__ import annotations

import threading
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.activations import ACT2CLS
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.pytorch_utils import Conv1D

from stars_kernels import ops
from stars_kernels.hf.view.rewrites.matching import has_hooks, is_plain, works_as

_packed = WeakTensorKeyDictionary()  # weight -> {(dtype, transposed): (its shape and hash when packed, the copy)}
_packing = threading.Lock()  # a decode that needs the same weights waits for them

SILU = {ACT2CLS["silu"], nn.SiLU}


class PackedLinear(nn.Module):
    """y = x W^T + b on a packed copy of W, in `dtype`; a Conv1D is a linear layer that stores W^T."""

    def __init__(self, linear: nn.Linear | Conv1D, dtype: torch.dtype) -> None:
        super().__init__()
        transposed = isinstance(linear, Conv1D)
        self.columns = linear.weight.shape[1 if transposed else 0]
        self.packed, self.bias = _pack(linear.weight, dtype, transposed), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return ops.call_op("packed_linear", x, self.packed, self.columns, self.bias)

    @property
    def packed_bytes(self) -> int:
        return self.packed.nbytes


class PackedMLP(nn.Module):
    """LlamaMLP on packed copies of its weights, gate and up in one op."""

    def __init__(self, mlp: LlamaMLP, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate, self.up = _pack(mlp.gate_proj.weight, dtype), _pack(mlp.up_proj.weight, dtype)
        self.columns, self.down_proj = len(mlp.gate_proj.weight), PackedLinear(mlp.down_proj, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.call_op("packed_swiglu", x, self.gate, self.up, self.columns))

    @property
    def packed_bytes(self) -> int:
        return self.gate.nbytes + self.up.nbytes + self.down_proj.packed_bytes


def is_swiglu(module: nn.Module) -> TypeGuard[LlamaMLP]:
    """Return whether a module is a LlamaMLP, or another family's that does the same, of layers that can be packed."""
    if not works_as(module, LlamaMLP):
        return False
    layers = (module.gate_proj, module.up_proj, module.down_proj)
    return (
        all(is_plain(layer, nn.Linear) and is_packable(layer) and layer.bias is None for layer in layers)
        and module.gate_proj.weight.shape == module.up_proj.weight.shape
        and type(module.act_fn) in SILU
        and not has_hooks(module.act_fn)
    )


def is_packable(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Return whether a module is a linear layer in fp32 on a CPU that does nothing else."""
    if not (is_plain(module, nn.Linear) or is_plain(module, Conv1D)):
        return False
    weight = module.weight
    dense = type(weight) is nn.Parameter  # and no subclass, such as torchao's quantized weights
    return dense and weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() > 0


def _pack(weight: Tensor, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    with _packing:
        copies = _packed.setdefault(weight, {})
        fingerprint = tuple(weight.shape), ops.content_hash(weight)
        known, packed = copies.get((dtype, transposed), (None, None))
        if known != fingerprint:
            packed = ops.pack_linear(weight.detach().T if transposed else weight.detach(), dtype)
            same = fingerprint[1] == ops.content_hash(weight)  # else it was written meanwhile: packed anew next time
            copies[dtype, transposed] = (fingerprint if same else None, packed)
    assert packed is not None
    return packed
