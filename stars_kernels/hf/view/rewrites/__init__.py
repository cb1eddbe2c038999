"""What is replaced on a view, and when: one table. A module is known by its forward's code, never by its class's name.

What cannot be replaced without a difference stays as it is: weights of another dtype or device, and modules with hooks
or a forward of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from stars_kernels import ops
from stars_kernels.hf.view.rewrites.activation import Elementwise, is_elementwise
from stars_kernels.hf.view.rewrites.merged import Part
from stars_kernels.hf.view.rewrites.merged import merge as merge
from stars_kernels.hf.view.rewrites.mlp import GatedMLP, is_gated
from stars_kernels.hf.view.rewrites.norm import RMSNorm, is_norm
from stars_kernels.hf.view.rewrites.packed import PackedLinear, PackedMLP, is_packable, is_swiglu
from stars_kernels.hf.view.rewrites.residual import FusedResiduals, fuse_residuals
from stars_kernels.hf.view.rewrites.rotary import turn_where_stored


class Rewrite(NamedTuple):
    matches: Callable[[Any], bool]
    replacement: Callable[[Any, torch.dtype], nn.Module]
    """Of the module that matches, and the dtype of packed weights."""


ALWAYS = (Rewrite(is_norm, lambda norm, _: RMSNorm(norm)), Rewrite(is_gated, lambda mlp, _: GatedMLP(mlp)))
PACKED = (
    Rewrite(is_swiglu, PackedMLP),
    Rewrite(is_packable, lambda linear, dtype: _with_original(linear, PackedLinear(linear, dtype))),
    Rewrite(is_elementwise, lambda activation, _: Elementwise(activation)),
)
"""Where weights are packed; activations go with them, as torch's round an element by its place in memory."""
REPLACEMENTS = (RMSNorm, GatedMLP, PackedMLP, PackedLinear, Elementwise, Part)


def rewrite(view: nn.Module) -> None:
    """Replace on `view` what is always replaced."""
    _replace(view, ALWAYS, torch.float32, adapters=True)
    turn_where_stored(view)
    fuse_residuals(view)


def pack(view: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    """Replace linear layers of `view` by packed ones and activations by `Elementwise`, where that is possible.

    Returns:
        The bytes of the packed weights.
    """
    if ops.backends()["packed_linear"]["cpu"] != "cpp":
        return 0  # its definition would unpack the weights at each call
    replaced = _replace(view, PACKED, dtype, adapters=False)
    return sum(module.packed_bytes for module in replaced if isinstance(module, PackedLinear | PackedMLP))


def _replace(module: nn.Module, table: Sequence[Rewrite], dtype: torch.dtype, adapters: bool) -> list[nn.Module]:
    """Put the first replacement that matches in place of each module inside of `module`; returns the new ones.

    adapters: also inside of PEFT's adapters, which are small and read by their weights.
    """
    replaced: list[nn.Module] = []
    inside_adapter = type(module).__module__.startswith("peft.")
    for name, child in list(module.named_children()):
        if inside_adapter and not adapters and name != "base_layer":
            continue
        found = next((row for row in table if row.matches(child)), None)
        if found is None:
            replaced += _replace(child, table, dtype, adapters)
        else:
            setattr(module, name, found.replacement(child, dtype))
            replaced.append(getattr(module, name))
    return replaced


def _with_original(linear: nn.Module, packed: PackedLinear) -> PackedLinear:
    """Keep the original weight, for code that reads it and not the layer's output."""
    packed.weight = linear.weight
    return packed


def served(view: nn.Module) -> dict[str, bool]:
    """Say of each op that stands for a part of a model's own code whether it does on this view."""
    return {
        "add_rms_norm": any(isinstance(module, FusedResiduals) for module in view.modules()),
        "gated": any(isinstance(module, GatedMLP) for module in view.modules()),
        "rms_norm": any(isinstance(module, RMSNorm) for module in view.modules()),
    }


def rewritten(view: nn.Module) -> list[nn.Module]:
    """Return the modules of `view` that stand for others."""
    return [module for module in view.modules() if isinstance(module, REPLACEMENTS)]
