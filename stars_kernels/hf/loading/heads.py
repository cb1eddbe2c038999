"""Reward heads that stand in a checkpoint beside a backbone, read by the prefix of their keys."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from stars_kernels.decoder.checks import shown


class Gated(nn.Module):
    """A head that weighs several objectives by what it makes of the prompt.

    The reward is the sum over k of gate(state at the prompt's end)[k] * objectives(state at the text's end)[k].
    """

    prompt_end: str
    """The text at whose first token, of its last place, the gate's state is taken."""
    objectives: Callable[[Tensor], Tensor]
    """[R, D] -> [R, K]"""
    gate: Callable[[Tensor], Tensor]
    """[R, D] -> [R, K]"""

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute [R, 2K] of hidden states [R, D]: the objectives, then the gate."""
        objectives, gate = self.objectives(hidden), self.gate(hidden)
        if objectives.shape != gate.shape:
            raise ValueError(
                f"its objectives have shape {list(objectives.shape)} and its gate {list(gate.shape)}, expected the same"
            )
        return torch.cat([objectives, gate], dim=-1)


PASS_THE_MODULE = "pass head=(prefix, module), the module that its weights belong to"


def read_head(path: str, prefix: str, module: nn.Module | None) -> nn.Module:
    """Read the head whose keys in the checkpoint begin with `prefix` and a dot ("" = that have no prefix).

    module: what the weights belong to; a copy is filled. None = told by the keys: one linear layer, or several numbered
    0, 2, 4, ..., with a ReLU between each two, as published reward models have them.
    """
    start = f"{prefix}." if prefix else ""
    if module is None:
        found = dict(_tensors(path, start))
        if not found:
            raise ValueError(f"head is {prefix!r}, but no key of the checkpoint {path!r} begins with {start!r}; "
                             f"expected the prefix of one of {_others(path)}")  # fmt: skip
        return _told_by_keys(found, prefix)
    wanted, found = module.state_dict(), dict(_tensors(path, start))
    for name, weight in wanted.items():
        if name not in found:
            raise ValueError(f"head has a weight {name!r}, but the checkpoint {path!r} has no key {start + name!r}; "
                             f"expected one of {_others(path)}")  # fmt: skip
        if found[name].shape != weight.shape:
            raise ValueError(f"head's weight {name!r} has shape {list(weight.shape)}, but the checkpoint's "
                             f"{start + name!r} has {list(found[name].shape)}; expected the same")  # fmt: skip
    module = copy.deepcopy(module)
    module.load_state_dict({name: found[name] for name in wanted}, assign=True)
    return module


def _told_by_keys(found: dict[str, Tensor], prefix: str) -> nn.Module:
    """Make the linear layers; found: names behind the prefix, such as weight, summary.weight or 2.bias."""
    layers = {name.removesuffix("weight") for name in found if name.endswith("weight")}
    numbers = sorted(int(part) if (part := layer.rstrip(".").rpartition(".")[2]).isdigit() else -1 for layer in layers)
    known = {layer + kind for layer in layers for kind in ("weight", "bias")}
    matrices = all(weight.dim() == 2 for name, weight in found.items() if name.endswith("weight"))
    if not found.keys() <= known or not matrices or numbers not in ([-1], list(range(0, 2 * len(layers), 2))):
        raise ValueError(
            f"head is {prefix!r}, whose keys {shown(sorted(found))} do not tell what it computes; expected one linear "
            f"layer, or several numbered 0, 2, 4, ... (else {PASS_THE_MODULE})"
        )
    order = sorted(layers, key=lambda layer: (len(layer), layer))
    parts: list[nn.Module] = []
    for layer in order:
        parts += [nn.ReLU(), _linear(found[layer + "weight"], found.get(layer + "bias"))]
    return nn.Sequential(*parts[1:]) if len(order) > 1 else parts[1]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """weight: [out, in]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}), assign=True)
    return layer


def _tensors(path: str, start: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint's tensors whose keys begin with `start`, without it."""
    for file in _files(path):
        with safe_open(file, "pt") as checkpoint:
            for key in checkpoint.keys():
                if key.startswith(start):
                    yield key.removeprefix(start), checkpoint.get_tensor(key)


def _others(path: str) -> str:
    """Return the keys of the checkpoint that are no layer's."""
    keys: list[str] = []
    for file in _files(path):
        with safe_open(file, "pt") as checkpoint:
            keys += [key for key in checkpoint.keys() if ".layers." not in f".{key}" and "embed" not in key]
    return ", ".join(map(repr, sorted(keys)[:12]))


def _files(path: str) -> list[Path]:
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    names = {"model.safetensors"}
    if index is not None:
        names = set(json.loads(Path(index).read_text())["weight_map"].values())
    return [Path(str(cached_file(path, name))) for name in sorted(names)]
