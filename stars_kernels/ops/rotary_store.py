"""rotary_store: turn queries and keys by their positions' phases (RoPE), and put keys and values where they are kept.

As transformers' Llama has it: x * cos + rotate_half(x) * sin, with each product and the sum rounded to the dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stars_kernels.ops.dispatch import call_op
from stars_kernels.ops.registry import define_op
from stars_kernels.ops.validate import check_device, check_dtype, check_shape

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def rotary_store(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, where: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Return the turned queries; keys[:, where[s]] becomes the turned key of token s, values[:, where[s]] its value.

    Args:
        query: [B, S, Hq, D], D even. key: [B, S, Hkv, D]. value: [B, S, Hkv, Dv]. All of one float dtype.
        cos, sin: [B, S, D], or [1, S, D] for all of the batch; of the same dtype.
        where: [S] int64, distinct, each less than T: a GPU does not look.
        keys: [B, T, Hkv, D] and values: [B, T, Hkv, Dv], contiguous, written in place.

    Returns:
        [B, S, Hq, D], contiguous.
    """
    check_shape("query", query, None, None, None, None)
    batch, steps, _, size = query.shape
    if size % 2 or size == 0:
        raise ValueError(f"query has heads of {size}, expected an even number: a head is turned in pairs")
    check_dtype("query", query, *DTYPES)
    check_shape("key", key, batch, steps, None, size)
    heads = key.shape[2]
    check_shape("value", value, batch, steps, heads, None)
    for name, phases in (("cos", cos), ("sin", sin)):
        check_shape(name, phases, 1 if phases.shape[:1] == (1,) else batch, steps, size)
    check_shape("where", where, steps)
    check_dtype("where", where, torch.int64)
    check_shape("keys", keys, batch, None, heads, size)
    check_shape("values", values, batch, keys.shape[1], heads, value.shape[3])
    floats = {"key": key, "value": value, "cos": cos, "sin": sin, "keys": keys, "values": values}
    for name, tensor in floats.items():
        check_dtype(name, tensor, query.dtype)
    for name, tensor in (("keys", keys), ("values", values)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, expected it contiguous")
    check_device(query, key=key, value=value, cos=cos, sin=sin, where=where, keys=keys, values=values)
    return call_op(_NAME, query, key, value, cos, sin, where, keys, values)


def rotary_store_ref(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, where: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """The definition."""
    keys[:, where], values[:, where] = turned(key, cos, sin), value
    return turned(query, cos, sin).contiguous()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [B, S, H, D]; cos, sin: [B or 1, S, D]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat((-high, low), dim=-1) * sin[:, :, None]


def _fake(query: Tensor, *rest: Tensor) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_NAME = define_op(
    "rotary_store(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor where, Tensor(a!) keys, "
    "Tensor(b!) values) -> Tensor",
    rotary_store_ref,
    _fake,
)
