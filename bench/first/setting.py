"""Where all is measured: device, dtype, shapes, and models whose weights are made on the device from a seed."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from bench.first import roofline
from bench.first.clock import Clock
from bench.first.roofline import SIZES, Gpu, Model, Shape
from bench.models import reward_model

DTYPE = torch.bfloat16
"""Everywhere, as the roofline counts its bytes; on a CPU too, whose way through the code is to be the same."""
SEED = 0
COPIES_BYTES = {"cpu": 2**20, "cuda": 256 * 2**20}
"""Of a measurement's data together: on a GPU more than its caches hold, so that a call finds none of it there."""
MAX_COPIES = {"cpu": 4, "cuda": 512}
POSITIONS = 1024
"""Of a model, prompt and answer."""


@dataclass
class Setting:
    """The device, and what has been made on it. `rates`: `copy` and `gemm`, as they are measured."""

    device: torch.device
    models: Sequence[str]
    rates: dict[str, float] = field(default_factory=dict)
    answers: dict[tuple[str, str], list[list[int]]] = field(default_factory=dict)
    """Tokens of eager decodes by model and shape, for those from graphs."""
    _loaded: tuple[str, PreTrainedModel, PreTrainedModel] | None = None

    @property
    def kind(self) -> str:
        """Return cpu or cuda."""
        return self.device.type

    @cached_property
    def clock(self) -> Clock:
        return Clock(self.device)

    @cached_property
    def datasheet(self) -> Gpu | None:
        if self.kind != "cuda":
            return None
        properties = torch.cuda.get_device_properties(self.device)
        return roofline.datasheet(properties.name, properties.total_memory)

    @property
    def gpu(self) -> Gpu | None:
        """What the roofline is asked for: the datasheet's GPU, else one of the rates that this run has measured."""
        if self.datasheet is not None:
            return self.datasheet
        return roofline.measured(**self.rates) if {"copy", "gemm"} <= set(self.rates) else None

    def shapes(self, name: str) -> tuple[Shape, ...]:
        """One prompt, and a batch."""
        return (Shape(1, 4, 24), Shape(4, 2, 24)) if name == "tiny" else (Shape(1, 20, 128), Shape(64, 3, 128))

    def copies(self, size: int) -> int:
        """How many times data of `size` bytes is laid out."""
        kind = self.kind
        return max(2, min(MAX_COPIES[kind], -(-COPIES_BYTES[kind] // size)))

    def noise(self, *shape: int, seed: int = SEED, scale: float = 1.0) -> Tensor:
        """Normal numbers in DTYPE, made on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device, dtype=DTYPE).mul_(scale)

    def prompts(self, name: str, shape: Shape) -> list[list[int]]:
        """Random token ids, the same on every device."""
        generator = torch.Generator().manual_seed(SEED)
        size = (shape.prompts, shape.prompt_tokens)
        ids: list[list[int]] = torch.randint(SIZES[name].vocabulary, size, generator=generator).tolist()
        return ids

    def load(self, name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The language model and the reward model, its own layers under a random head; one pair at a time is kept."""
        if self._loaded is None or self._loaded[0] != name:
            self.unload()
            model = language_model(SIZES[name], self.device)
            self._loaded = name, model, reward_model(model)
        return self._loaded[1:]

    def unload(self) -> None:
        self._loaded = None
        self.sweep()

    def sweep(self) -> None:
        """Give back what a part has left behind."""
        gc.collect()
        if self.kind == "cuda":
            torch.cuda.empty_cache()


def language_model(size: Model, device: torch.device) -> PreTrainedModel:
    """Make a Llama or Qwen2 of this size in DTYPE, its weights from SEED, on the device and nowhere else."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(SEED)
        return AutoModelForCausalLM.from_config(config(size), dtype=DTYPE).eval()


def config(size: Model) -> PreTrainedConfig:
    """Return transformers' configuration of the size; no token ends a text."""
    kind = Qwen2Config if size.qkv_bias else LlamaConfig
    return kind(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim, max_position_embeddings=POSITIONS, tie_word_embeddings=size.tied,
        initializer_range=size.hidden**-0.5, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
