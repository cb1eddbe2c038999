"""Decoder layers that add a residual and norm the sum in one op, and add the second one in the last product."""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from stars_kernels import ops
from stars_kernels.hf.view.rewrites.matching import has_hooks, is_plain
from stars_kernels.hf.view.rewrites.mlp import GatedMLP
from stars_kernels.hf.view.rewrites.norm import RMSNorm


def fuse_residuals(view: nn.Module) -> int:
    """Let the decoder layers of a private copy fuse their residuals; return how many do.

    They are known by their forward's code, which is LlamaDecoderLayer's, and by norms that are an `RMSNorm` by now.
    """
    found = [module for module in view.modules() if _is_layer(module)]
    for module in found:
        module.__class__ = _fused(type(module))  # type: ignore[arg-type]  # a class is hashable
    return len(found)


def _is_layer(module: nn.Module) -> bool:
    kind = type(module)
    if not is_plain(module, kind) or _code(kind) != _code(LlamaDecoderLayer):  # type: ignore[arg-type]
        return False
    norm = getattr(module, "post_attention_layernorm", None)
    return isinstance(norm, RMSNorm) and not has_hooks(norm)


@functools.cache
def _code(kind: type[nn.Module]) -> tuple[Any, ...]:
    """Return what a class's forward does, inside of transformers' wrapper for gradients, which are not wanted here."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    if code is None or code.co_freevars:
        return (kind,)
    return code.co_code, code.co_names, code.co_consts, code.co_varnames


@functools.cache
def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (FusedResiduals, kind), {"__module__": kind.__module__})


class FusedResiduals(nn.Module):
    """What the class of such a layer inherits from first."""

    def forward(self, hidden_states: Tensor, **others: Any) -> Tensor:
        """As LlamaDecoderLayer.forward; others: of its own arguments by their names, which are the attention's too."""
        layer = cast(LlamaDecoderLayer, self)
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **others)
        norm = cast(RMSNorm, layer.post_attention_layernorm)
        if attended.dtype == hidden_states.dtype == norm.weight.dtype:
            residual, normed = ops.call_op("add_rms_norm", attended, hidden_states, norm.weight, norm.eps)
        else:
            residual = hidden_states + attended
            normed = norm(residual)
        mlp: Any = layer.mlp
        return mlp(normed, residual) if type(mlp) is GatedMLP and not has_hooks(mlp) else residual + mlp(normed)
