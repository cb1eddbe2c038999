"""Rotary phases (position x frequency) in full fp32, where transformers computes them as a matrix product.

Where TF32 is allowed (`torch.set_float32_matmul_precision("high")`), a matrix product rounds both to 11 bits: at
position 4000, phases are a radian off. Element by element they have the bits of a full fp32 product, always.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MATMULS = (torch.matmul, Tensor.matmul)


class OuterProducts(TorchFunctionMode):
    """Within it, matrix products with one term per sum, [..., M, 1] @ [..., 1, N], are computed element by element."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in MATMULS and len(args) == 2 and all(a.dim() > 1 for a in args) and args[0].shape[-1] == 1:
            return args[0] * args[1]
        return function(*args, **(kwargs or {}))


class _Elementwise(nn.Module):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with OuterProducts():
            return super().__call__(*args, **kwargs)


@functools.cache
def _elementwise(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Elementwise, kind), {})


def keep_phases_exact(view: nn.Module) -> None:
    """Make the rotary modules of a private copy compute their phases element by element.

    These are known by having no parameters and a forward of `position_ids`. They change their class, so that what reads
    their attributes, or has put another forward on one (accelerate), finds what it expects.
    """
    for module in view.modules():
        if "position_ids" in inspect.signature(type(module).forward).parameters and not list(module.parameters()):
            module.__class__ = _elementwise(type(module))  # type: ignore[arg-type]  # a class is hashable
