"""Activations that round an element the same wherever in a tensor it lies: torch's round it by its place in memory."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from stars_kernels.hf.view.rewrites.matching import is_plain

ACTIVATIONS = {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()} | {nn.GELU}
"""transformers' activations: what has no parameters among them works element by element."""
VECTOR = 32
"""Elements at a time of torch's vectorised loops in fp32, in the widest build (two registers of AVX-512); it goes
through what is left over at the end of a thread's part one by one, with other roundings."""
SERIAL, SHARE = 16384, 32768
"""Of elements: up to the first no activation is split among threads; then gelu is, among all of them, and any other
among as many as get a share of the second (at::internal::GRAIN_SIZE)."""


class Elementwise(nn.Module):
    """An activation that rounds an element the same wherever in `x` it lies, for fp32 on a CPU."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape. It is padded so that every thread's part is whole vectors."""
        if x.dtype != torch.float32 or not x.is_cpu:
            return self.function(x)
        size = x.numel()
        padded = _in_whole_vectors(size, torch.get_num_threads())
        if padded == size and x.is_contiguous():
            return self.function(x)
        flat = nn.functional.pad(x.reshape(-1), (0, padded - size))
        return self.function(flat)[:size].view(x.shape)


@cache
def _in_whole_vectors(size: int, threads: int) -> int:
    """Return the next size of which every thread's part is whole vectors."""
    while True:
        parts = 1 if size <= SERIAL else math.lcm(threads, min(threads, -(-size // SHARE)))
        if size % (VECTOR * parts) == 0:
            return size
        size += -size % (VECTOR * parts)  # which may be a share more


def is_elementwise(module: nn.Module) -> bool:
    kind = type(module)
    return kind in ACTIVATIONS and is_plain(module, kind) and not module.state_dict()
