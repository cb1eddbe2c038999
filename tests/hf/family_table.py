"""What was measured of each family, and the table of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIER_OF,
)

import stars_kernels
import stars_kernels.hf.cache
from stars_kernels.hf.cache import ForkCache, GatheredCache
from stars_kernels.hf.cache.recurrent import States
from stars_kernels.hf.families import CLASSIFIERS, REFUSED, STATES, STEPS, WORKS
from stars_kernels.hf.view.attention import FULL
from stars_kernels.hf.view.copying import view_of
from stars_kernels.hf.view.layout import Layout, context_limit, layout_of, text_config
from stars_kernels.hf.view.rewrites import merge, mlp, norm, served
from stars_kernels.hf.view.rewrites.merged import Part
from stars_kernels.ops.registry import definitions
from tests.hf import bits_check, families
from tests.hf.fork_check import check_logits

DOCUMENT = Path(__file__).parents[2] / "docs/families.md"
HIDDEN_FEATURES = {
    "bloom": ["ALiBi"], "gpt_neo": ["window"], "mpt": ["ALiBi"], "xglm": ["sinusoidal positions"],
    "ctrl": ["sinusoidal positions"],
}  # fmt: skip
"""What neither the cache nor the modules show."""


@dataclass(frozen=True)
class Found:
    """path: how the model reads its past. features: of its attention. error: the largest of its logits.

    without: the error where one of its features is left out, so that the check is seen to see it.
    fused: what of its code is an op of ours on a GPU. fused_error: the error where it is one here too.
    """

    path: str
    features: list[str]
    error: float
    without: dict[str, float]
    fused: list[str]
    fused_error: float


@functools.cache
def measured(family: str) -> Found:
    model = families.tiny(family)
    layout = layout_of(view_of(model))

    def error() -> float:
        return check_logits(model, float("inf"), layout.steps)

    windows: set[int] = set()
    with patch.object(ForkCache, "attend", _noting(windows)):
        own = error()
    without: dict[str, float] = {}
    if any(windows):
        with patch.object(ForkCache, "attend", _attend_without_window):
            without["window"] = error()
    if any(layer.softcap for layer in layout.layers):
        with _layers_with(softcap=0.0):
            without["soft-cap"] = error()
    if any(layer.sinks is not None for layer in layout.layers):
        with _layers_with(sinks=None):
            without["sinks"] = error()
    if layout.states:
        with patch.object(States, "open", _open_emptied):
            without["states"] = error()
    if layout.mode == "gathered":
        with patch.object(GatheredCache, "_arguments", _arguments_without_mask):
            without["padding mask"] = error()
    with patch.object(ForkCache, "_arguments", _late_arguments):
        late = error()
    positions = late > own + 1e-9
    if positions:
        without["positions"] = late
    with _fused_as_on_a_gpu():
        fused, fused_error = _fused(view_of(model)), error()
    path = STEPS if layout.steps else STATES if layout.states else layout.mode
    return Found(path, _features(family, model, layout, list(without), positions), own, without, fused, fused_error)


FUSED = {
    "norm": "RMS norms: `rms_norm`",
    "RoPE": "rotary embeddings, with the write of keys and values: `rotary_store`",
    "MLP": "gated MLPs: `gated`",
    "residual": "decoder layers: `add_rms_norm`, and the second residual in the MLP's last product",
    "QKV": "queries, keys and values in one product, where there is memory for a copy",
    "gate-up": "gate and up in one product, where there is memory for a copy",
}
"""What may be fused, and by what."""


@contextmanager
def _fused_as_on_a_gpu() -> Iterator[None]:
    """Let views be what they are on a GPU with much memory; norms too, which are not replaced in float64 otherwise."""

    def merged(model):
        view = view_of(model)
        merge(view)
        return view

    def normed(x, weight, eps):
        """As the models do, in float32 whatever x is."""
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def added(x, residual, weight, eps):
        return residual + x, normed(residual + x, weight, eps)

    with (
        stars_kernels.reference(),
        patch.dict(definitions, {"rms_norm": normed, "add_rms_norm": added}),
        patch.object(mlp, "fuses", lambda weight: True),
        patch.object(norm, "DTYPES", (*norm.DTYPES, torch.float64)),
        patch("stars_kernels.hf.view.rewrites.merged.memory_of", lambda device: 2**40),
        patch("tests.hf.fork_check.view_of", merged),
    ):
        yield


def _fused(view) -> list[str]:
    used = served(view)
    merge(view)
    parts = [module for module in view.modules() if isinstance(module, Part)]
    found = {
        "norm": used["rms_norm"],
        "RoPE": any(layer.rotates for layer in layout_of(view).layers),
        "MLP": used["gated"],
        "residual": used["add_rms_norm"],
        "QKV": any(len(part.product.sizes) == 3 for part in parts),
        "gate-up": any(len(part.product.sizes) == 2 for part in parts),
    }
    return [name for name in FUSED if found[name]]


_attend, _arguments, _open = ForkCache.attend, ForkCache._arguments, States.open
_gathered_arguments = GatheredCache._arguments


def _noting(windows: set[int]):
    def attend(self, query, key, value, mask, scale, options):
        windows.add(mask.window)
        return _attend(self, query, key, value, mask, scale, options)

    return attend


def _attend_without_window(self, query, key, value, mask, scale, options):
    return _attend(self, query, key, value, FULL, scale, options | {"sliding_window": None})


def _late_arguments(self, positions):
    return _arguments(self, positions + (positions.shape[0] > 1))  # several rows: behind the prefix


def _arguments_without_mask(self, positions):
    arguments = _gathered_arguments(self, positions)
    return arguments | {"attention_mask": torch.ones_like(arguments["attention_mask"])}


def _open_emptied(self, rows):
    _open(self, rows)
    for state in self.rows.values():
        state[rows] = 0


@contextmanager
def _layers_with(**changes) -> Iterator[None]:
    def changed(view) -> Layout:
        layout = layout_of(view)
        return replace(layout, layers=[replace(layer, **changes) for layer in layout.layers])

    with patch.object(stars_kernels.hf.cache, "layout_of", changed):
        yield


def _features(family: str, model, layout: Layout, seen: list[str], positions: bool) -> list[str]:
    config = text_config(model)
    heads = getattr(config, "num_attention_heads", 0)
    stored = {layer.key[0] for layer in layout.layers}  # heads of keys
    modules = dict(model.named_modules())
    embeddings = {m.num_embeddings for m in modules.values() if isinstance(m, nn.Embedding)}
    limit = context_limit(model)
    rope = str(getattr(config, "rope_parameters", None))
    partial = "partial_rotary_factor" in rope or getattr(config, "rotary_dim", None)
    latent = getattr(config, "kv_lora_rank", None) and any(layer.key[1] != layer.value[1] for layer in layout.layers)
    grouped = any(1 < n < heads for n in stored)
    found = {
        "none": not stored,
        "latent": bool(latent),
        "MQA": stored == {1},
        "GQA": grouped and not latent,
        "MHA": bool(stored) and stored != {1} and not grouped and not latent,
        "window": "window" in seen,
        "soft-cap": "soft-cap" in seen,
        "sinks": "sinks" in seen,
        "shared keys": any(layer.source is not None for layer in layout.layers),
        "partial rotary": bool(partial) and positions,
        "learned positions": any(limit <= n < limit + 3 for n in embeddings) and positions,
        "no positions": bool(stored) and not positions and family not in HIDDEN_FEATURES,
        "experts": any("expert" in f"{name} {type(module).__name__}".lower() for name, module in modules.items()),
    }
    return [name for name, true in found.items() if true] + HIDDEN_FEATURES.get(family, [])


ENCODER = "that reads its whole text both ways"
HEAD = """# Language models and reward models, family by family

Written by `python -m tests.hf.test_families --write docs/families.md`: every entry of transformers' mapping of causal
language models, each as a tiny random model in float64 (xglm, whose forward fails in it, in float32). "Logit error" is
the largest difference between logits through the fork cache and those of the model's own forward, relative to the
largest logit; answers were equal, token for token, to the sequential loop's. Errors near 1e-7 are those of softmaxes,
routers and scans that transformers computes in float32 in any model; where they are 1e-5, a linear attention's whole
recurrence is.

Paths: **hook**, prefixes are read where they lie; **gathered**, the class has no attention hook, so each layer gets
copies of whole rows: exact, but prefixes are copied at each step; **states**, as hook, and convolution and recurrent
states are copied for each row; **steps**, as states, but one token a forward behind a prompt, as transformers' own
forward of several tokens behind a state is wrong.

"fp32 bits" is for float32 on a CPU, with the compiled extension and packed weights: **equal**, answers and rewards (of
the family's own sequence classifier where it is a reward model, else of a head on its hidden states) are the same to
the bit whatever the width and the batch; otherwise the ops of torch in its forward whose roundings depend on the rows
beside a row: products over shapes that differ, and functions that round an element by its place in memory. There the
tiny model's tokens were equal too, but its rewards may differ in their last bits. Where only luck made them equal, as
sizes are multiples of 32, the ops are named all the same ([exactness.md](exactness.md) has the reasons).

"Fused on a GPU" names what of a family's own code one of our ops stands for there, on its view: a module is known by
its forward's code or, for the two products, by what its layers are given. Logits of every family were also compared
with all of that done here, in float64.
"""


WRONG = """## Where transformers differs from itself

The model's own forwards with its own cache, against its forward without one. (Language models are fed one token at a
time behind their prompts, so some of these work all the same.)

| model_type | other logits |
|---|---|"""
WAYS = {"step": "of one token behind others", "chunk": "of several tokens behind others"}


def table(bits: Callable[[str], str] = bits_check.cell) -> str:
    """The document; bits: the last column's entry for a family."""
    works = [f for f in sorted(FAMILIES) if FAMILIES[f] in WORKS]
    paths = [WORKS[FAMILIES[f]] for f in works]
    counts = ", ".join(f"{paths.count(path)} {path}" for path in dict.fromkeys(paths))
    refused = [f for f in sorted(FAMILIES) if FAMILIES[f] in REFUSED]
    cells = {family: bits(family) for family in works}
    equal = list(cells.values()).count(bits_check.EQUAL)
    lines = [
        HEAD,
        f"## Works: {len(works)} of {len(FAMILIES)} ({counts}), equal to the bit in fp32: {equal}\n",
        "| fused on a GPU | families |\n|---|---|",
        *(f"| {what} | {sum(name in measured(f).fused for f in works)} |" for name, what in FUSED.items()),
        "\n| model_type | class | path | attention | logit error | fused on a GPU | "
        "its sequence classifier as reward model | fp32 bits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family in works:
        found, kind = measured(family), CLASSIFIER_OF.get(family)
        rated = "" if kind is None else "yes" if kind in CLASSIFIERS else f"no: one {REFUSED.get(kind, ENCODER)}"
        row = [family, FAMILIES[family], found.path, ", ".join(found.features), f"{found.error:.1e}"]
        row += [", ".join(found.fused), rated]
        row.append(cells[family])
        lines.append(f"| {' | '.join(row)} |")
    lines += [f"\n## Refused: {len(refused)}\n", "| model_type | class | why: it is a model |", "|---|---|---|"]
    for family in refused:
        lines.append(f"| {family} | {FAMILIES[family]} | {REFUSED[FAMILIES[family]]} |")
    lines += ["\nClassifiers of these are no reward models with a cache either.\n", WRONG]
    for family, ways in families.WRONG_IN_TRANSFORMERS.items():
        lines.append(f"| {family} | {' and '.join(WAYS[way] for way in ways)} |")
    return "\n".join(lines) + "\n"
