"""For Triton kernels: Philox4x32-10, the same integers as stars_kernels/ops/philox.py, and the race's noise.

No fused multiply-add may enter: launch with enable_fp_fusion=False.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stars_kernels.ops.philox import STREAM_ACCEPT

ACCEPT = tl.constexpr(STREAM_ACCEPT)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 counters and keys, scalars or blocks; returns four words of c0's shape."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def token_words(blocks, key, position, attempt, stream):
    """The random bits of token ids 4 * blocks, + 1, + 2 and + 3; key, position, attempt: int64, broadcast."""
    c0 = blocks.to(tl.uint32)
    c2 = (attempt | (stream.to(tl.int64) << 24)).to(tl.uint32)
    zero = tl.full([], 0, tl.uint32)
    return philox4x32(c0, position.to(tl.uint32), c2, zero, key.to(tl.uint32), (key >> 32).to(tl.uint32))


@triton.jit
def token_bits(ids, key, position, attempt, stream):
    """The random bits of token ids in any order: four times the work of `token_words`."""
    w0, w1, w2, w3 = token_words(ids >> 2, key, position, attempt, stream)
    odd = (ids & 1) == 1
    return tl.where((ids & 2) == 2, tl.where(odd, w3, w2), tl.where(odd, w1, w0))


@triton.jit
def accept_uniform(key, position, attempt):
    """u(a) of each attempt, float64 in (0, 1): key, position, attempt are int64 of one shape."""
    bits, _, _, _ = token_words(attempt * 0, key, position, attempt, tl.full([], ACCEPT, tl.int32))
    return (bits.to(tl.float64) + 0.5) * 2.0**-32


@triton.jit
def noise(bits):
    """log(-log1p(-v)) of v = min((bits + 1/2) 2^-32, 1 - 2^-24), by IEEE operations: equal bits on every device."""
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    exponent = _exponent(1 - v)
    scale = ((127 - exponent) << 23).to(tl.float32, bitcast=True)  # 2^-exponent
    return log(-_log_of((scale - 1) - scale * v, exponent))  # the argument is exact: (1 - v) scale - 1


@triton.jit
def log(x):
    exponent = _exponent(x)
    mantissa = (x.to(tl.int32, bitcast=True) - (exponent << 23)).to(tl.float32, bitcast=True)
    return _log_of(mantissa - 1, exponent)


@triton.jit
def _exponent(x):
    """The e that brings x 2^-e into [sqrt(1/2), sqrt(2))."""
    return (x.to(tl.int32, bitcast=True) - 0x3F3504F3) >> 23


@triton.jit
def _log_of(f, exponent):
    """log((1 + f) 2^exponent) for 1 + f in [sqrt(1/2), sqrt(2)), to about one ulp; Cephes' polynomial."""
    square = f * f
    p = 7.0376836292e-2 * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    e = exponent.to(tl.float32)
    rest = p * f * square - 2.12194440e-4 * e - 0.5 * square
    return f + rest + 0.693359375 * e
