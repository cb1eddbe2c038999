"""rotary_store on a GPU: one launch for what takes twelve, a program a token and a few of its heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_kernels.ops.rotary_store import rotary_store_ref
from stars_kernels.ops.triton._launch import on_device_of

HEADS = 8  # of a program


def rotary_store_triton(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, where: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """See `ops.rotary_store`. float64 runs the definition."""
    if query.dtype == torch.float64:
        return rotary_store_ref(query, key, value, cos, sin, where, keys, values)
    batch, steps, query_heads, size = query.shape
    heads, value_size = value.shape[2:]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if batch * steps == 0:
        return out
    query, key, value = map(_tokens, (query, key, value))
    cos, sin = cos.contiguous(), sin.contiguous()
    grid = batch * steps, triton.cdiv(query_heads, HEADS) + triton.cdiv(heads, HEADS)
    with on_device_of(query):
        _rotary_store[grid](
            query, key, value, cos, sin, where, keys, values, out,
            query.stride(1), key.stride(1), value.stride(1), steps, len(cos) * steps, keys.shape[1],
            query_heads, heads, SIZE=size, VALUE_SIZE=value_size, HEADS=HEADS,
            HALF=triton.next_power_of_2(size // 2), VALUES=triton.next_power_of_2(value_size),
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _tokens(x: Tensor) -> Tensor:
    """Return [B, S, H, D] with dense heads and one stride from token to token, batch after batch; mostly x itself."""
    batch, steps, _, size = x.shape
    dense = x.stride(3) == 1 and x.stride(2) == size and (batch == 1 or x.stride(0) == steps * x.stride(1))
    return x if dense else x.contiguous()


@triton.jit(do_not_specialize=["steps", "phases", "room", "query_heads", "key_heads"])
def _rotary_store(
    query, key, value, cos, sin, where, keys, values, out,
    query_stride, key_stride, value_stride, steps, phases, room, query_heads, key_heads,
    SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """HEADS heads of the queries of one token or, behind those, of its keys and values."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    query_groups = tl.cdiv(query_heads, HEADS)
    d = tl.arange(0, HALF)
    lanes = d < SIZE // 2
    phase = token % phases * SIZE
    cos_low = tl.load(cos + phase + d, mask=lanes, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + phase + SIZE // 2 + d, mask=lanes, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + phase + d, mask=lanes, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + phase + SIZE // 2 + d, mask=lanes, other=0.0).to(tl.float32)
    if group < query_groups:  # no pointer leaves a branch: Triton 3.6 cannot have that on AMD
        head = group * HEADS + tl.arange(0, HEADS)
        _turn(
            query + token * query_stride, out + token * query_heads * SIZE, head, head < query_heads, d, lanes,
            cos_low, cos_high, sin_low, sin_high, SIZE,
        )  # fmt: skip
    else:
        head = (group - query_groups) * HEADS + tl.arange(0, HEADS)
        place = token // steps * room + tl.load(where + token % steps)
        _turn(
            key + token * key_stride, keys + place * key_heads * SIZE, head, head < key_heads, d, lanes,
            cos_low, cos_high, sin_low, sin_high, SIZE,
        )  # fmt: skip
        e = tl.arange(0, VALUES)
        there = (head < key_heads)[:, None] & (e < VALUE_SIZE)[None, :]
        at = head[:, None] * VALUE_SIZE + e[None, :]
        copied = tl.load(value + token * value_stride + at, mask=there, other=0.0)
        tl.store(values + place * key_heads * VALUE_SIZE + at, copied, mask=there)


@triton.jit
def _turn(source, target, head, heads, d, lanes, cos_low, cos_high, sin_low, sin_high, SIZE: tl.constexpr):
    """Turn heads [H, SIZE] of one token: each product is rounded, then their sum."""
    at = head[:, None] * SIZE + d[None, :]
    there = heads[:, None] & lanes[None, :]
    dtype = target.dtype.element_ty
    low = tl.load(source + at, mask=there, other=0.0).to(tl.float32)
    high = tl.load(source + at + SIZE // 2, mask=there, other=0.0).to(tl.float32)
    straight = (low * cos_low[None, :]).to(dtype).to(tl.float32)
    crossed = (-high * sin_low[None, :]).to(dtype).to(tl.float32)
    tl.store(target + at, (straight + crossed).to(dtype), mask=there)
    straight = (high * cos_high[None, :]).to(dtype).to(tl.float32)
    crossed = (low * sin_high[None, :]).to(dtype).to(tl.float32)
    tl.store(target + at + SIZE // 2, (straight + crossed).to(dtype), mask=there)
