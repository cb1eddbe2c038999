"""Sizes of GPUs and models, for the model of `roofline`."""

from __future__ import annotations

from dataclasses import dataclass

BF16 = 2  # bytes of a weight, a key, a value, a logit


@dataclass(frozen=True)
class Gpu:
    """Peak rates: bytes and operations a second, dense."""

    name: str
    bandwidth: float
    tensor_flops: float  # bf16
    vector_flops: float  # fp32
    memory: float


@dataclass(frozen=True)
class Model:
    """A Llama or Qwen2; a reward model is the same layers with a head of one output."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    qkv_bias: bool = False

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> int:
        """Weights of a layer's linears."""
        return self.hidden * (2 * self.query_size + 2 * self.kv_size + 3 * self.intermediate)

    @property
    def merged(self) -> int:
        """Weights that are copied where queries, keys and values are one product, and gate and up another."""
        return self.layers * self.hidden * (self.query_size + 2 * self.kv_size + 2 * self.intermediate)

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        bias = self.query_size + 2 * self.kv_size if self.qkv_bias else 0
        return (1 if self.tied else 2) * self.head + self.layers * (self.linears + bias + 2 * self.hidden) + self.hidden

    @property
    def kv_bytes(self) -> int:
        """Of a token, all layers."""
        return self.layers * 2 * self.kv_size * BF16


# NVIDIA's datasheets: H100 Tensor Core GPU (SXM; 1,979 TFLOP/s with sparsity), A100 80GB (SXM), L4 (242 with sparsity).
GPUS = {
    "h100": Gpu("H100 SXM", 3.35e12, 989e12, 67e12, 80e9),
    "h200": Gpu("H200 SXM", 4.8e12, 989e12, 67e12, 141e9),
    "a100": Gpu("A100 80GB SXM", 2.039e12, 312e12, 19.5e12, 80e9),
    "l4": Gpu("L4", 300e9, 121e12, 30.3e12, 24e9),
}
MODELS = {
    "llama-7b": Model("Llama-7B", 32, 4096, 32, 32, 128, 11008, 32000),
    "llama-3-8b": Model("Llama-3-8B", 32, 4096, 32, 8, 128, 14336, 128256),
    "qwen2.5-0.5b": Model("Qwen2.5-0.5B", 24, 896, 14, 2, 64, 4864, 151936, tied=True, qkv_bias=True),
}

MERGE_SHARE = 1 / 64
"""Of a GPU's memory, for copies of a model's weights: stars_kernels/hf/view/rewrites/merged.py."""


def merges(m: Model, gpu: Gpu) -> bool:
    """Say whether the engine computes products of a model together that read the same tensor."""
    return BF16 * m.merged <= MERGE_SHARE * gpu.memory
