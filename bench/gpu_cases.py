"""The launches of `gpu_build`: each Triton op as the engine calls it for known models, on tensors without data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.sizes import MODELS
from stars_kernels.ops.triton import LAUNCHERS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
HEADS = {m.name: (m.heads, m.kv_heads, m.head_dim) for m in MODELS.values()}
HEADS |= {"Phi-3-mini": (32, 32, 96), "Gemma-2-2B": (8, 4, 256)}
PROMPT_SLOTS, SEGMENT, BATCH, WIDTH = 1152, 15, 64, 8

ONE = {"16 rows": dict(prompts=1, rows=16)}
USUAL = ONE | {"64 prompts x 8 rows": dict(prompts=BATCH, rows=BATCH * WIDTH)}
SCORE = {"16 rows, score": dict(prompts=1, rows=16, steps=SEGMENT)}
PREFILL = {"prefill": dict(prompts=16, rows=16, steps=64, slots=64)}
ALL = {"16 rows, window, softcap, sinks": dict(prompts=1, rows=16, window=512, softcap=50.0, sinks=True)}
ATTENTION = (
    ("Llama-3-8B", "bf16", USUAL | SCORE | PREFILL | ALL), ("Llama-3-8B", "fp16", ONE),
    ("Llama-3-8B", "fp32", ONE | SCORE),
    ("Llama-7B", "bf16", USUAL), ("Qwen2.5-0.5B", "bf16", USUAL | SCORE), ("Qwen2.5-0.5B", "fp32", ONE | SCORE),
    ("Phi-3-mini", "bf16", ONE), ("Phi-3-mini", "fp32", ONE), ("Gemma-2-2B", "bf16", ONE | SCORE | ALL),
    ("Gemma-2-2B", "fp32", ONE | SCORE | ALL),
)  # fmt: skip
FILTERS = {"no filter": (0, 1.0, 0.0), "top-k": (40, 1.0, 0.0), "top-p": (0, 0.9, 0.0), "all": (40, 0.9, 0.05)}


class Case(NamedTuple):
    name: tuple[str, str, str]  # model or size, call, dtype
    launch: Callable[[], Any]


def floats(dtype: str, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=DTYPES[dtype], device="meta")


def integers(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.int64, device="meta")


def cases() -> Iterator[Case]:
    for model, dtype, calls in ATTENTION:
        heads, kv_heads, size = HEADS[model]
        for name, call in calls.items():
            launch = partial(attention, dtype, heads, kv_heads, size, **call)
            yield Case((f"{model} {heads}/{kv_heads} x {size}", name, dtype), launch)
    for vocabulary in (m.vocabulary for m in MODELS.values()):
        for name, filters in FILTERS.items():
            yield Case((f"{vocabulary:,}", name, "bf16"), partial(sample, "bf16", vocabulary, filters))
    for dtype, (name, filters) in itertools.product(("fp16", "fp32"), FILTERS.items()):
        yield Case(("128,256", name, dtype), partial(sample, dtype, 128256, filters))
    for key, dtype, rows in (
        ("llama-3-8b", "bf16", 16), ("llama-3-8b", "bf16", 512),
        ("qwen2.5-0.5b", "bf16", 512), ("qwen2.5-0.5b", "fp32", 512),
    ):  # fmt: skip
        m = MODELS[key]
        launch = partial(sample_head, dtype, m.vocabulary, m.hidden, rows)
        yield Case((f"{m.name} {m.vocabulary:,} x {m.hidden}", f"{rows} rows", dtype), launch)
    for size, norm, dtype in ((4096, False, "bf16"), (4096, True, "bf16"), (4096, False, "fp32"), (896, False, "bf16")):
        name = "norm and bias" if norm else "plain"
        yield Case((f"{size} features", name, dtype), partial(reward, dtype, size, norm))
    for size, dtype in ((4096, "bf16"), (896, "bf16"), (128, "bf16"), (8192, "bf16"), (4096, "fp32")):
        yield Case((f"rms_norm of {size}", f"{BATCH * WIDTH} rows", dtype), partial(norm_rows, dtype, size))
    for size, dtype in ((4096, "bf16"), (896, "bf16"), (4096, "fp32")):
        yield Case((f"add_rms_norm of {size}", f"{BATCH * WIDTH} rows", dtype), partial(add_norm_rows, dtype, size))
    for size, activation, dtype in ((14336, "silu", "bf16"), (4864, "silu", "fp32"), (9216, "gelu_tanh", "bf16")):
        yield Case((f"gated, {size}", activation, dtype), partial(gate_rows, dtype, size, activation))
    for model, dtype in (
        ("Llama-3-8B", "bf16"),
        ("Qwen2.5-0.5B", "bf16"),
        ("Phi-3-mini", "fp16"),
        ("Llama-3-8B", "fp32"),
    ):
        heads, kv_heads, size = HEADS[model]
        launch = partial(store, dtype, heads, kv_heads, size)
        yield Case((f"{model} {heads}/{kv_heads} x {size}", "rotary_store", dtype), launch)
    for key, dtype in (("llama-3-8b", "bf16"), ("llama-7b", "bf16"), ("qwen2.5-0.5b", "bf16"), ("llama-3-8b", "fp32")):
        m = MODELS[key]
        launch = partial(commit, dtype, m.layers, m.kv_heads, m.head_dim)
        yield Case((f"{m.name} {m.kv_heads} x {m.head_dim}", f"{m.layers} layers", dtype), launch)
    for dtype, hard in (("fp32", False), ("fp64", False), ("fp32", True)):
        yield Case(("accept", "hard" if hard else "soft", dtype), partial(judge, dtype, hard))


def attention(
    dtype: str, heads: int, kv_heads: int, size: int, *, prompts: int, rows: int, steps: int = 1, slots: int = SEGMENT,
    prefix: int = PROMPT_SLOTS, window: int = 0, softcap: float = 0.0, sinks: bool = False,
) -> None:  # fmt: skip
    """A layer's views of ForkCache."""
    query = floats(dtype, rows, heads, steps, size).transpose(1, 2)
    keys, values = floats(dtype, 2, 2, rows, slots, kv_heads, size)[1]
    arena_keys, arena_values = floats(dtype, 2, 2, prompts * prefix, kv_heads, size)[1]
    LAUNCHERS["fork_attention"](
        query, keys, values, integers(rows), integers(rows), arena_keys, arena_values, integers(prompts),
        integers(prompts), integers(rows), size**-0.5, window, softcap, floats(dtype, heads) if sinks else None,
    )  # fmt: skip


def sample(dtype: str, vocabulary: int, filters: tuple[int, float, float], sources: int = BATCH) -> None:
    first = filters == FILTERS["top-k"]  # rows draw from the logits of their prompt
    rows, source = (sources * WIDTH, integers(sources * WIDTH)) if first else (sources, None)
    draws = (integers(rows), integers(rows), integers(rows), source)
    LAUNCHERS["segment_sample"](floats(dtype, sources, vocabulary), *draws, 0.7, *filters, 0)


def sample_head(dtype: str, vocabulary: int, size: int, rows: int) -> None:
    draws = (integers(rows), integers(rows), integers(rows))
    LAUNCHERS["lm_head_sample"](floats(dtype, rows, size), floats(dtype, vocabulary, size), *draws, 0.7, 0)


def reward(dtype: str, size: int, norm: bool, rows: int = BATCH * WIDTH, steps: int = SEGMENT) -> None:
    extras = (floats(dtype, 1), floats(dtype, size)) if norm else (None, None)
    hidden = floats(dtype, rows, steps, size)
    LAUNCHERS["reward_head"](hidden, integers(rows), floats(dtype, size), *extras, 1e-5)


def norm_rows(dtype: str, size: int, rows: int = BATCH * WIDTH) -> None:
    LAUNCHERS["rms_norm"](floats(dtype, rows, 1, size), floats(dtype, size), 1e-5)


def add_norm_rows(dtype: str, size: int, rows: int = BATCH * WIDTH) -> None:
    x, residual = (floats(dtype, rows, 1, size) for _ in range(2))
    LAUNCHERS["add_rms_norm"](x, residual, floats(dtype, size), 1e-5)


def gate_rows(dtype: str, size: int, activation: str, rows: int = BATCH * WIDTH) -> None:
    """Both halves are parts of one product's rows."""
    LAUNCHERS["gated"](*floats(dtype, rows, 1, 2 * size).chunk(2, dim=-1), activation)


def store(
    dtype: str, heads: int, kv_heads: int, size: int, *, rows: int = BATCH * WIDTH, steps: int = 1, slots: int = SEGMENT
) -> None:
    """Queries, keys and values are parts of one product's rows."""
    joined = floats(dtype, rows, steps, heads + 2 * kv_heads, size)
    query, key, value = joined.split([heads, kv_heads, kv_heads], dim=2)
    phases = [floats(dtype, rows, steps, size) for _ in range(2)]
    kept = [floats(dtype, rows, slots, kv_heads, size) for _ in range(2)]
    LAUNCHERS["rotary_store"](query, key, value, *phases, integers(steps), *kept)


def commit(
    dtype: str, layers: int, kv_heads: int, size: int, *, prompts: int = BATCH, rows: int = BATCH * WIDTH,
    steps: int = SEGMENT, prefix: int = PROMPT_SLOTS,
) -> None:  # fmt: skip
    suffix = floats(dtype, layers, 2, rows, steps, kv_heads, size)
    arena = floats(dtype, layers, 2, prompts * prefix, kv_heads, size)
    advance = torch.empty(prompts, dtype=torch.bool, device="meta")
    LAUNCHERS["kv_commit"](suffix, arena, *(integers(prompts) for _ in range(5)), advance)


def judge(dtype: str, hard: bool, prompts: int = BATCH, width: int = WIDTH) -> None:
    rewards, thresholds = floats(dtype, prompts, width), floats("fp64", prompts, width)
    valid = torch.empty(prompts, width, dtype=torch.bool, device="meta")
    per_prompt, best = (integers(prompts) for _ in range(3)), (floats("fp64", prompts), integers(prompts))
    LAUNCHERS["accept"](rewards, valid, thresholds, 0.5, hard, *per_prompt, 20, *best)
