"""Linear layers that read the same tensor, computed in one product: queries, keys and values; gate and up.

They cost a second copy of their weights, so this is for a GPU that has many times that. The first of them computes all,
and the others take their part, if they are given the very tensor that it was given: nothing else is assumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stars_kernels.hf.view.rewrites.matching import is_plain

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
SHARE = 1 / 64
"""Of a GPU's memory, for all copies of a model's weights."""


def merge(view: nn.Module) -> int:
    """Merge the siblings of a view's modules where there is memory for it; return the bytes of the copies.

    Weights are read here, and not again.
    """
    found = list[tuple[nn.Module, tuple[str, ...], list[nn.Linear]]]()
    for module, names in itertools.product(view.modules(), SIBLINGS):
        candidates = [getattr(module, name, None) for name in names]
        if _are_siblings(candidates):
            found.append((module, names, cast(list[nn.Linear], candidates)))
    size = sum(layer.weight.nbytes for *_, layers in found for layer in layers)
    if not found or size > SHARE * memory_of(found[0][2][0].weight.device):
        return 0
    for module, names, layers in found:
        product = Product(layers)
        for index, name in enumerate(names):
            setattr(module, name, Part(product, index, layers[index]))
    return size


def memory_of(device: torch.device) -> int:
    """Return the bytes of a GPU's memory; 0 of a CPU, where layers are packed one by one."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def _are_siblings(layers: Sequence[Any]) -> bool:
    """Say whether these are plain linear layers of one kind, with weights that are nothing special."""
    kinds = set()
    for layer in layers:
        if not is_plain(layer, nn.Linear) or type(layer.weight) is not nn.Parameter:
            return False
        kinds.add((layer.in_features, layer.weight.dtype, layer.weight.device, layer.bias is None))
    return len(kinds) == 1


class Product:
    """The product of several linear layers with one input."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.weight = torch.cat([layer.weight.detach() for layer in layers])
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
        self.sizes = [layer.out_features for layer in layers]
        self._given: Tensor | None = None
        self._parts: list[Tensor] = []

    def part(self, index: int, x: Tensor) -> Tensor:
        """Return one layer's output; what was computed for the others is kept until the last has asked for it."""
        if x is not self._given:
            self._given, self._parts = x, list(F.linear(x, self.weight, self.bias).split(self.sizes, dim=-1))
        part = self._parts[index]
        if index == len(self.sizes) - 1:
            self._given, self._parts = None, []
        return part


class Part(nn.Module):
    """One of several linear layers that are one product."""

    def __init__(self, product: Product, index: int, layer: nn.Linear) -> None:
        """layer: whose output it has; its weight stays, for code that reads it and not the output."""
        super().__init__()
        self.product, self.index, self.weight, self.bias = product, index, layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.product.part(self.index, x)
