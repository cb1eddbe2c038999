"""content_hash: 64 bits that tell whether a weight is still what it was.

    words w_i     the tensor's bytes, 8 at a time, i = 0, 1, 2, ...
    hash          sum over i of mix(w_i + (i + 1) * GOLDEN), modulo 2^64

`mix` is a bijection (that of SplitMix64), so a change of one word always shows, and a word that moves to another place
gives another summand: rows that are swapped, rolled or sorted show as well. One read of the tensor; any two others
collide by chance alone, once in 2^64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stars_kernels.ops.dispatch import call_op
from stars_kernels.ops.registry import define_op

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as a signed integer, as all constants here
MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
CHUNK_WORDS = 1 << 20
"""Words that the definition mixes at once."""


def content_hash(x: Tensor) -> int:
    """Hash the bytes of `x`, of any shape and dtype, in the order of its elements; equal bytes give equal hashes."""
    return int(call_op(_NAME, x.detach()))


def content_hash_ref(x: Tensor) -> Tensor:
    """The definition."""
    octets = x.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)  # a copy is aligned
    words = F.pad(octets, (0, -len(octets) % 8)).view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for begin in range(0, len(words), CHUNK_WORDS):
        chunk = words[begin : begin + CHUNK_WORDS]
        place = torch.arange(begin + 1, begin + len(chunk) + 1, device=x.device)
        total += _mix(chunk + place * GOLDEN).sum()
    return total


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer, on int64 that hold uint64: products wrap, shifts fill with zeros."""
    z = (z ^ _shifted(z, 30)) * MULTIPLIERS[0]
    z = (z ^ _shifted(z, 27)) * MULTIPLIERS[1]
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _fake(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.int64)


_NAME = define_op("content_hash(Tensor x) -> Tensor", content_hash_ref, _fake)
