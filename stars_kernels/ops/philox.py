"""Philox4x32-10, the counter-based generator behind every random number (Salmon et al., SC'11).

No state: a number is a function of (key, counter). The key names the request; the counter names the token id, its
position in the answer, the stream and the attempt, so the noise of a token never depends on a batch row, a rank among
survivors or the order of calls. The same integers come from PyTorch (here) and C++ (csrc/philox.h).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

STREAM_SAMPLE, STREAM_ACCEPT, STREAM_CALIBRATE = 0, 1, 2
MAX_ATTEMPTS = 1 << 24  # an attempt's number shares a counter word with its stream
MAX_POSITIONS = 1 << 32  # a position fills one

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten rounds on broadcastable int64 tensors that hold uint32 values; returns four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, which keeps all 64 bits of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def request_key(seed: int, request_id: int | str) -> int:
    """Return the 64-bit key of a request, as a signed integer: blake2b of (seed, request id)."""
    kind = "int" if isinstance(request_id, int) else "str"
    text = f"{seed}|{kind}|{request_id}".encode(errors="surrogatepass")  # a str may hold half a character
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def token_bits(keys: Tensor, ids: Tensor | int, position: Tensor, attempt: Tensor, stream: int) -> Tensor:
    """Return the 32 random bits of each token.

    keys, position, attempt: [R] int64; ids: [R, M] int64 token ids, or an int V for all ids 0..V-1.
    Returns [R, M] (or [R, V]) int64 in [0, 2^32).
    """
    if isinstance(ids, int):  # four ids share a counter: compute each once
        blocks = torch.arange((ids + 3) // 4, device=keys.device)[None]
        words = _philox_rows(keys, blocks, position, attempt, stream)
        return torch.stack(words, dim=-1).flatten(1)[:, :ids]
    words = _philox_rows(keys, ids >> 2, position, attempt, stream)
    return torch.stack(words, dim=-1).gather(-1, (ids & 3).unsqueeze(-1)).squeeze(-1)


def accept_uniform(keys: Tensor, position: Tensor, attempt: Tensor) -> Tensor:
    """Return u(a) of each attempt, float64 in (0, 1): keys, position, attempt broadcast to one shape."""
    c2 = (STREAM_ACCEPT << 24) | attempt
    zero = torch.zeros_like(c2)
    bits = philox4x32((zero, position, c2, zero), _split(keys))[0]
    return (bits.double() + 0.5) * 2.0**-32


def accept_uniforms(keys: Sequence[int], positions: Sequence[int], attempts: Sequence[int]) -> list[float]:
    """Return u(a) of several attempts, computed on the host."""
    numbers = (torch.tensor(column, dtype=torch.int64) for column in (keys, positions, attempts))
    uniforms: list[float] = accept_uniform(*numbers).tolist()
    return uniforms


def _split(keys: Tensor) -> tuple[Tensor, Tensor]:
    return keys & _MASK, (keys >> 32) & _MASK


def _philox_rows(keys: Tensor, c0: Tensor, position: Tensor, attempt: Tensor, stream: int) -> Words:
    k0, k1 = _split(keys[:, None])
    c2 = (stream << 24) | attempt[:, None]
    return philox4x32((c0, position[:, None], c2, torch.zeros_like(c2)), (k0, k1))
