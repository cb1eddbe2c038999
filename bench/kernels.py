"""Sizes of GPUs, models and kernels, for the model of `roofline`: bytes and operations by formula."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

BF16 = 2  # bytes of a weight, a key, a value, a logit
BANDWIDTH_SHARE, FLOPS_SHARE = 0.8, 0.6  # of the datasheet's that a program gets
L2_BYTES = 40e6  # of the smallest of these GPUs: activations that fit cost no bandwidth
RACE_FLOPS = 150  # vector operations for a token's key in the race: 1/4 of Philox4x32-10, two logarithms
FILTER_FLOPS = 10  # and for finding the tokens that top-k and top-p leave
SURVIVORS = 1024  # candidates a row that the filters' second read writes into a buffer, 8 bytes each
LINEARS, ELEMENTWISE, ATTENTION = 7, 32, 2  # launches of a layer, transformers' Llama in bf16; attention in two parts
FUSED_ELEMENTWISE = 4  # residual and norm, twice; RoPE and the write of keys and values; SiLU and product
QUERY_BLOCK = 128  # queries for which fork_attention reads a prefix once: rows x tokens x heads of a group
STEP_LAUNCHES = 35  # of a forward outside its layers: embedding, rotary table, final norm, positions


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
    "a100": Gpu("A100 80GB SXM", 2.039e12, 312e12, 19.5e12, 80e9),
    "l4": Gpu("L4", 300e9, 121e12, 30.3e12, 24e9),
}
MODELS = {
    "llama-7b": Model("Llama-7B", 32, 4096, 32, 32, 128, 11008, 32000),
    "llama-3-8b": Model("Llama-3-8B", 32, 4096, 32, 8, 128, 14336, 128256),
    "qwen2.5-0.5b": Model("Qwen2.5-0.5B", 24, 896, 14, 2, 64, 4864, 151936, tied=True, qkv_bias=True),
}


class Kernel(NamedTuple):
    name: str
    bytes: float  # of a call, as the two below
    flops: float = 0.0  # on tensor cores
    vector_flops: float = 0.0
    calls: float = 1  # a round
    launches: int = 1  # a call
    phase: str = ""  # the host waits at its end
    graphed: bool = False  # part of a CUDA graph, where there are any

    def limits(self, gpu: Gpu) -> dict[str, float]:
        """Seconds of a call by what may bound it."""
        return {
            "memory": self.bytes / (BANDWIDTH_SHARE * gpu.bandwidth),
            "tensor": self.flops / (FLOPS_SHARE * gpu.tensor_flops),
            "vector": self.vector_flops / (FLOPS_SHARE * gpu.vector_flops),
        }

    def seconds(self, gpu: Gpu) -> float:
        """Of all its calls."""
        return self.calls * max(self.limits(gpu).values())


def prefix_reads(m: Model, rows: float, tokens: float = 1) -> int:
    """Of fork_attention for a prompt with that many rows."""
    return math.ceil(rows * tokens * m.heads / m.kv_heads / QUERY_BLOCK)


def forward(
    m: Model, name: str, rows: float, tokens: float = 1, *, prefixes: float, prefix: float, own: float,
    calls: int = 1, head: bool = True, fused: bool = False,
) -> list[Kernel]:  # fmt: skip
    """`tokens` new tokens of each row, of `own` in its suffix; a prefix is read `prefixes` times, not for each row.

    Weights are read once. Activations cost bandwidth only where they do not fit into the L2 cache. fused: the
    element-wise kernels.
    """
    new = rows * tokens
    cached = new * max(4 * m.hidden, BF16 * m.intermediate) <= L2_BYTES
    rotated = m.query_size + m.kv_size
    if fused:  # bytes a token: 8 in residual and norm, 4 in RoPE and copy, 6 in SiLU and product, for each element
        elementwise = 16 * m.hidden + 4 * (rotated + m.kv_size) + 6 * m.intermediate
    else:  # 36 in the 8 kernels of a norm, 6 in a residual, 20 in RoPE, 4 in a copy, 10 in SiLU and product
        elementwise = 84 * m.hidden + 20 * rotated + 8 * m.kv_size + 10 * m.intermediate
    around = 8 * m.hidden + 2 * m.query_size + 2 * m.kv_size + 3 * m.intermediate  # inputs and outputs of the linears
    keys = prefix + own - (tokens - 1) / 2  # that a query sees, on average
    kv = 2 * m.kv_size * BF16 * (prefixes * prefix + rows * own)
    layers, moved = m.layers, 0 if cached else new
    kernels = [
        Kernel(f"{name}: linears", BF16 * layers * (m.linears + moved * around), 2 * layers * m.linears * new,
               calls=calls, launches=LINEARS * layers),
        Kernel(f"{name}: element-wise", layers * moved * elementwise, calls=calls,
               launches=(FUSED_ELEMENTWISE if fused else ELEMENTWISE) * layers + STEP_LAUNCHES),
        Kernel(f"{name}: fork_attention", kv + 2 * BF16 * new * m.query_size, 4 * new * m.query_size * keys,
               calls=calls * layers, launches=ATTENTION),
    ]  # fmt: skip
    if head:
        kernels.append(lm_head(m, name, rows, calls))
    return kernels


def lm_head(m: Model, name: str, rows: float, calls: int, logits: bool = True) -> Kernel:
    written = rows * m.vocabulary if logits else 0
    return Kernel(f"{name}: LM head", BF16 * (m.head + rows * m.hidden + written), 2 * m.head * rows, calls=calls)


def segment_sample(m: Model, name: str, rows: float, read: float, calls: int, filtered: bool) -> Kernel:
    """`rows` tokens from `read` different rows of logits; filters read twice, and use a scratch."""
    one = BF16 * read * m.vocabulary
    if not filtered:
        work = RACE_FLOPS * rows * m.vocabulary
        return Kernel(f"{name}: segment_sample", one, vector_flops=work, calls=calls, launches=2)
    scratch = 2 * rows * (m.vocabulary / 64 * 8 + SURVIVORS * 8)  # written and read: group statistics, candidates
    work = rows * (FILTER_FLOPS * m.vocabulary + RACE_FLOPS * SURVIVORS)
    return Kernel(f"{name}: segment_sample", 2 * one + scratch, vector_flops=work, calls=calls, launches=4)


def fuse(m: Model, name: str, rows: float, calls: int) -> Kernel:
    """LM head and draw at temperature alone in one op, at best: no logits in memory, all arithmetic overlapped."""
    head = lm_head(m, name, rows, calls, logits=False)
    return head._replace(name=f"{name}: LM head + draw", vector_flops=RACE_FLOPS * rows * m.vocabulary, launches=2)
