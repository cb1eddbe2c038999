"""Linear layers on packed weights (`ops.packed_linear`): faster on a CPU where rows are few, and row by row to the bit.

Only on the engine's view of a model, never on the user's. It costs a second copy of the weights beside the originals,
kept for as long as these live and shared by all views of them. A packed layer keeps its original weight, which the
model's code may read by itself: for its dtype, or for a product of its own. Every call reads the weights once and packs
those anew that have changed since, whatever changed them (`ops.content_hash`): a write through `.data` or NumPy leaves
no other trace. Changes during a call are seen by the next. What cannot be replaced without a difference stays as it is:
weights of another dtype or device, and modules with hooks or a forward of their own.

Activations go with them (`Elementwise`), as torch's round an element by its place in memory.
"""

from __future__ import annotations

import math
import threading
from functools import cache
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.activations import ACT2CLS
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.pytorch_utils import Conv1D

from stars_kernels import ops
from stars_kernels.ops._registry import call_op

Kind = TypeVar("Kind", bound=nn.Module)

_packed = WeakTensorKeyDictionary()  # weight -> {(dtype, transposed): (its shape and hash when packed, the copy)}
_packing = threading.Lock()  # a decode that needs the same weights waits for them

ACTIVATIONS = {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()} | {nn.GELU}
"""transformers' activations: what has no parameters among them works element by element."""
SILU = {ACT2CLS["silu"], nn.SiLU}
VECTOR = 32
"""Elements at a time of torch's vectorised loops in fp32, in the widest build (two registers of AVX-512); it goes
through what is left over at the end of a thread's part one by one, with other roundings."""
SERIAL, SHARE = 16384, 32768
"""Of elements: up to the first no activation is split among threads; then gelu is, among all of them, and any other
among as many as get a share of the second (at::internal::GRAIN_SIZE)."""


class PackedLinear(nn.Module):
    """y = x W^T + b on a packed copy of W, in `dtype`; a Conv1D is a linear layer that stores W^T."""

    def __init__(self, linear: nn.Linear | Conv1D, dtype: torch.dtype) -> None:
        super().__init__()
        transposed = isinstance(linear, Conv1D)
        self.columns = linear.weight.shape[1 if transposed else 0]
        self.packed, self.bias = _pack(linear.weight, dtype, transposed), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return call_op("packed_linear", x, self.packed, self.columns, self.bias)


class Elementwise(nn.Module):
    """An activation that rounds an element the same wherever in `x` it lies, for fp32 on a CPU."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape. It is padded so that every thread's part is whole vectors."""
        if x.dtype != torch.float32 or not x.is_cpu:
            return self.function(x)
        size = x.numel()
        padded = _in_whole_vectors(size, torch.get_num_threads())
        if padded == size and x.is_contiguous():
            return self.function(x)
        flat = nn.functional.pad(x.reshape(-1), (0, padded - size))
        return self.function(flat)[:size].view(x.shape)


@cache
def _in_whole_vectors(size: int, threads: int) -> int:
    """The next size of which every thread's part is whole vectors."""
    while True:
        parts = 1 if size <= SERIAL else math.lcm(threads, min(threads, -(-size // SHARE)))
        if size % (VECTOR * parts) == 0:
            return size
        size += -size % (VECTOR * parts)  # which may be a share more


class PackedMLP(nn.Module):
    """LlamaMLP on packed copies of its weights, gate and up in one op."""

    def __init__(self, mlp: LlamaMLP, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate, self.up = _pack(mlp.gate_proj.weight, dtype), _pack(mlp.up_proj.weight, dtype)
        self.columns, self.down_proj = len(mlp.gate_proj.weight), PackedLinear(mlp.down_proj, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(call_op("packed_swiglu", x, self.gate, self.up, self.columns))


def pack_linears(view: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    """Replace linear layers of `view` by packed ones and activations by `Elementwise`, where that is possible.

    Returns:
        The bytes of the packed weights.
    """
    if ops.backends()["packed_linear"]["cpu"] != "cpp":
        return 0  # its definition would unpack the weights at each call
    size = 0
    adapter = type(view).__module__.startswith("peft.")
    for name, child in list(view.named_children()):
        if adapter and name != "base_layer":
            continue  # small, and read by their weights
        if works_as(child, LlamaMLP) and _is_swiglu(child):
            mlp = PackedMLP(child, dtype)
            setattr(view, name, mlp)
            size += mlp.gate.nbytes + mlp.up.nbytes + mlp.down_proj.packed.nbytes
        elif _is_packable(child):
            layer = PackedLinear(child, dtype)
            layer.weight = child.weight  # the original, for code that reads it and not the layer's output
            setattr(view, name, layer)
            size += layer.packed.nbytes
        elif _is_elementwise(child):
            setattr(view, name, Elementwise(child))
        else:
            size += pack_linears(child, dtype)
    return size


def _is_swiglu(mlp: LlamaMLP) -> bool:
    layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return (
        all(is_plain(layer, nn.Linear) and _is_packable(layer) and layer.bias is None for layer in layers)
        and mlp.gate_proj.weight.shape == mlp.up_proj.weight.shape
        and type(mlp.act_fn) in SILU
        and not has_hooks(mlp.act_fn)
    )


def _is_elementwise(module: nn.Module) -> bool:
    kind = type(module)
    return kind in ACTIVATIONS and is_plain(module, kind) and not module.state_dict()


def _is_packable(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    if not (is_plain(module, nn.Linear) or is_plain(module, Conv1D)):
        return False
    weight = module.weight
    dense = type(weight) is nn.Parameter  # and no subclass, such as torchao's quantized weights
    return dense and weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() > 0


def is_plain(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether `module` is a `kind` that does what its class says and nothing else."""
    return type(module) is kind and "forward" not in vars(module) and not has_hooks(module)


def works_as(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether `module`, of any class, does what a `kind` does: transformers writes one class for each family."""
    own: type[nn.Module] = type(module)
    return _code(own) == _code(kind) and is_plain(module, own)  # type: ignore[arg-type]


@cache
def _code(kind: type[nn.Module]) -> tuple[Any, ...]:
    """What a class's forward does: the same for two classes with the same lines of code."""
    code = getattr(kind.forward, "__code__", None)
    if code is None or code.co_freevars:  # wrapped: what is inside does not show
        return (kind,)
    known = [kind.forward.__globals__.get(name) for name in code.co_names]  # the same name may mean another function
    return code.co_code, code.co_names, code.co_consts, code.co_varnames, known


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


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
