"""Linear layers on packed weights (`ops.packed_linear`): faster on a CPU where rows are few.

Only on the engine's view of a model, never on the user's. It costs a second copy of the weights, kept for as long as
the originals live and shared by all views of them. Every call reads the weights once and packs those anew that have
changed since, whatever changed them (`ops.content_hash`): a write through `.data` or NumPy leaves no other trace.
Changes during a call are seen by the next. What cannot be replaced without a difference stays as it is: weights
of another dtype or device, those that the model's code reads by themselves, and modules with hooks or a forward of
their own.
"""

from __future__ import annotations

import inspect
import re
import threading
from functools import cache
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.models.llama.modeling_llama import LlamaMLP

from stars_kernels import ops
from stars_kernels.ops._registry import call_op

Kind = TypeVar("Kind", bound=nn.Module)

_packed = WeakTensorKeyDictionary()  # weight -> {dtype: (its shape and hash when packed, the packed copy)}
_packing = threading.Lock()  # a decode that needs the same weights waits for them


class PackedLinear(nn.Module):
    """y = x W^T + b on a packed copy of W, in `dtype`."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed, self.bias, self.columns = _pack(linear.weight, dtype), linear.bias, len(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return call_op("packed_linear", x, self.packed, self.columns, self.bias)


class PackedMLP(nn.Module):
    """LlamaMLP on packed copies of its weights, gate and up in one op."""

    def __init__(self, mlp: LlamaMLP, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate, self.up = _pack(mlp.gate_proj.weight, dtype), _pack(mlp.up_proj.weight, dtype)
        self.columns, self.down_proj = len(mlp.gate_proj.weight), PackedLinear(mlp.down_proj, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(call_op("packed_swiglu", x, self.gate, self.up, self.columns))


def pack_linears(view: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    """Replace the linear layers of `view` by packed ones where that is possible; the bytes of the packed weights."""
    if ops.backends()["packed_linear"]["cpu"] != "cpp":
        return 0  # its definition would unpack the weights at each call
    size = 0
    adapter = type(view).__module__.startswith("peft.")
    for name, child in list(view.named_children()):
        if adapter and name != "base_layer":
            continue  # small, and read by their weights
        if is_plain(child, LlamaMLP) and _is_swiglu(child):
            mlp = PackedMLP(child, dtype)
            setattr(view, name, mlp)
            size += mlp.gate.nbytes + mlp.up.nbytes + mlp.down_proj.packed.nbytes
        elif _is_packable(child) and not _reads_weight(type(view), name):  # type: ignore[arg-type]
            layer = PackedLinear(child, dtype)
            if adapter:
                layer.weight = child.weight
            setattr(view, name, layer)
            size += layer.packed.nbytes
        else:
            size += pack_linears(child, dtype)
    return size


@cache
def _reads_weight(parent: type, name: str) -> bool:
    """Whether a module's code takes the weight of its linear layer `name` by itself, as some routers and mixers do."""
    try:
        return re.search(rf"\.{re.escape(name)}\.weight\b", inspect.getsource(parent)) is not None
    except (OSError, TypeError):  # no source: nobody knows
        return True


def _is_swiglu(mlp: LlamaMLP) -> bool:
    layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return (
        all(_is_packable(layer) and layer.bias is None for layer in layers)
        and mlp.gate_proj.weight.shape == mlp.up_proj.weight.shape
        and mlp.config.hidden_act == "silu"
        and not has_hooks(mlp.act_fn)
    )


def _is_packable(module: nn.Module) -> TypeGuard[nn.Linear]:
    if not is_plain(module, nn.Linear):
        return False
    weight = module.weight
    dense = type(weight) is nn.Parameter  # and no subclass, such as torchao's quantized weights
    return dense and weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() > 0


def is_plain(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether `module` is a `kind` that does what its class says and nothing else."""
    return type(module) is kind and "forward" not in vars(module) and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    with _packing:
        copies = _packed.setdefault(weight, {})
        fingerprint = tuple(weight.shape), ops.content_hash(weight)
        known, packed = copies.get(dtype, (None, None))
        if known != fingerprint:
            packed = ops.pack_linear(weight.detach(), dtype)
            copies[dtype] = (fingerprint, packed)
    assert packed is not None
    return packed
