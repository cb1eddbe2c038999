"""What a device can carry: a round's cost, which all "auto" follow, and the prompts that its memory holds.

They change speed and memory only. Figures of devices and models are small dataclasses, so that a machine without a GPU
can ask about one.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from stars_kernels.decoder.width import LAYER_LAUNCHES, MAX_SLOTS, MERGED_LAUNCHES, Cost, CpuCost, GpuCost, ModelSize
from stars_kernels.hf.loading.reward_model import ENCODERS
from stars_kernels.hf.view.layout import Layout, Plane, layout_of, text_config, vocabulary
from stars_kernels.hf.view.rewrites.merged import Part

MEMINFO = Path("/proc/meminfo")
UNKNOWN_BATCH = 8
"""Prompts side by side where not all that a row keeps is known."""
MEMORY_SHARE = 0.8
"""Of the free memory, for what prompts and rows keep; the rest is for a forward's activations."""
HALF_FLOPS = {(8, 0): 2048, (8, 6): 1024, (9, 0): 4096, (9, 4): 2048, (10, 0): 8192, (12, 0): 1024}
"""Operations per clock of a multiprocessor in half precision, dense, from a compute capability on; gfx942 is 9.4."""
FLOAT_FLOPS = {(8, 0): 128, (8, 6): 256}
"""The same in fp32."""


@dataclass(frozen=True)
class Gpu:
    """bandwidth: bytes per second. flops: operations per second, dense. Both are the datasheet's."""

    bandwidth: float
    flops: float


def gpu_of(device: torch.device, dtype: torch.dtype) -> Gpu:
    """Return the figures of a GPU for products in `dtype`, from its clocks; no clock is read."""
    found = torch.cuda.get_device_properties(device)
    capability = (found.major, found.minor)
    table = HALF_FLOPS if dtype.itemsize == 2 else FLOAT_FLOPS
    per_clock = table[max((c for c in table if c <= capability), default=min(table))]
    return Gpu(
        bandwidth=2 * 1e3 * found.memory_clock_rate * found.memory_bus_width / 8,  # two transfers a clock, in kHz
        flops=1e3 * found.clock_rate * found.multi_processor_count * per_clock,
    )


def free_memory_of(device: torch.device) -> int:
    """Return the bytes that may still be taken: on a GPU free ones, and those that torch holds unused.

    Of a CPU what Linux calls available; elsewhere, and of other devices, it is unbounded.
    """
    if device.type == "cpu" and MEMINFO.exists():
        told = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return 1024 * int(told["MemAvailable"].split()[0]) if "MemAvailable" in told else sys.maxsize
    if device.type != "cuda":
        return sys.maxsize
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def models_in(bodies: Iterable[nn.Module]) -> list[PreTrainedModel]:
    """Find the models among the reward models' bodies: a head on hidden states is none, a likelihood may have two."""
    parts = [part for body in bodies for part in (body if isinstance(body, nn.ModuleList) else [body])]
    return [part for part in parts if isinstance(part, PreTrainedModel)]


def round_cost(
    model: PreTrainedModel,
    rewards: Sequence[PreTrainedModel],
    segment_size: int,
    graphs: bool,
    asks: bool = False,
    gpu: Gpu | None = None,
) -> Cost:
    """Return what a round costs on the device of `model`.

    Args:
        model: the language model's view.
        rewards: the views of `models_in`; counted as if they were on the same device and read a segment for each row.
        graphs: whether segments run as CUDA graphs.
        asks: whether a reward function is asked.
        gpu: the figures of the GPU; None = those of the model's device, where that is one.
    """
    if gpu is None:
        if model.device.type != "cuda":
            return CpuCost(segment_size, reads=asks or bool(rewards))
        gpu = gpu_of(model.device, model.dtype)
    sizes = tuple(map(size_of, rewards))
    return GpuCost(size_of(model), sizes, segment_size, gpu.bandwidth, gpu.flops, graphs, asks)


def size_of(model: PreTrainedModel) -> ModelSize:
    """Return what a forward of a view reads and computes; experts count as if all were asked."""
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output is not None and output.weight is embeddings.weight
    read = [p for p in model.parameters() if tied or p is not embeddings.weight]  # few rows of the table are
    config, item = text_config(model), model.dtype.itemsize
    return ModelSize(
        weights=sum(p.nbytes for p in read),
        parameters=sum(p.numel() for p in read),
        layers=config.num_hidden_layers,
        kv_bytes=sum(map(_token_bytes, _planes(model))),
        state_bytes=config.hidden_size * item,
        logits_bytes=0 if output is None else vocabulary(model) * item,
        layer_launches=MERGED_LAUNCHES if any(isinstance(m, Part) for m in model.modules()) else LAYER_LAUNCHES,
    )


def fitting_prompts(
    model: PreTrainedModel,
    rewards: Sequence[PreTrainedModel],
    tokens: int,
    width: int,
    segment_size: int,
    free: Callable[[torch.device], int] = free_memory_of,
) -> int:
    """Return how many prompts the free memory holds side by side, at most MAX_SLOTS.

    A power of two, so that a little more or less memory in use seldom changes it.

    Args:
        model, rewards: as of `round_cost`.
        tokens: of the longest prompt and answer.
        width, segment_size: attempts of a prompt side by side, at most, and tokens of each.
        free: bytes that may be taken on a device.
    """
    if not all(_is_known(layout_of(view)) for view in (model, *filter(_has_cache, rewards))):
        return UNKNOWN_BATCH
    needs = prompt_bytes(model, rewards, tokens, width, segment_size)
    fitting = min(int(MEMORY_SHARE * free(device)) // need for device, need in needs.items() if need)
    bounded = max(1, min(fitting, MAX_SLOTS))
    return 1 << (bounded.bit_length() - 1)


def prompt_bytes(
    model: PreTrainedModel, rewards: Sequence[PreTrainedModel], tokens: int, width: int, segment_size: int
) -> Mapping[torch.device, int]:
    """Return the bytes that one prompt and its rows keep on each device; see `fitting_prompts`.

    Keys, values and the language model's logits; not the logits that a `Likelihood` keeps for each prompt.
    """
    needs: Counter[torch.device] = Counter()
    for view in (model, *rewards):
        for plane in _planes(view):
            needs[plane[3]] += (tokens + width * segment_size) * _token_bytes(plane)
    needs[model.device] += (1 + width) * vocabulary(model) * model.dtype.itemsize  # logits
    return needs


def _is_known(layout: Layout) -> bool:
    """Say whether the layout tells all that a row keeps."""
    return layout.mode == "hook" and not layout.states


def _has_cache(model: PreTrainedModel) -> bool:
    return type(model).__name__ not in ENCODERS


def _planes(model: PreTrainedModel) -> list[Plane]:
    """List the keys and values that a view keeps, layer by layer."""
    layers = layout_of(model).layers if _has_cache(model) else []
    return [plane for layer in layers if layer.source is None for plane in (layer.key, layer.value)]


def _token_bytes(plane: Plane) -> int:
    heads, size, dtype, _ = plane
    return heads * size * dtype.itemsize
