"""lm_head_sample: the output layer and the draw in one op, so that a GPU never stores the logits.

Plain temperature only: a filter needs the whole row before its first token is known to survive. The logits are rounded
to the model's dtype before they race, as if they had been stored, so this is the distribution of `segment_sample`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stars_kernels.ops.dispatch import call_op
from stars_kernels.ops.philox import STREAM_SAMPLE
from stars_kernels.ops.registry import define_op
from stars_kernels.ops.segment_sample import MAX_TEMPERATURE, MIN_TEMPERATURE, segment_sample_ref
from stars_kernels.ops.validate import check_device, check_dtype, check_shape


def lm_head_sample(
    hidden: Tensor,
    weight: Tensor,
    keys: Tensor,
    attempt: Tensor,
    position: Tensor,
    *,
    temperature: float = 1.0,
    stream: int = STREAM_SAMPLE,
) -> tuple[Tensor, Tensor]:
    """Sample one token per row from softmax(hidden weight^T / temperature).

    Args:
        hidden: [R, D], any float dtype. weight: [V, D] of the same dtype.
        keys, attempt, position: [R] int64, as in `segment_sample`. temperature: 1e-30 to 1e30.

    Returns:
        token [R] int64 and logprob [R] float32, as in `segment_sample`.
    """
    check_shape("hidden", hidden, None, None)
    check_shape("weight", weight, None, hidden.shape[1])
    if not hidden.is_floating_point():
        raise ValueError(f"hidden has dtype {hidden.dtype}, expected a float dtype")
    check_dtype("weight", weight, hidden.dtype)
    if 0 in weight.shape:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected no empty dimension")
    for name, tensor in (("keys", keys), ("attempt", attempt), ("position", position)):
        check_shape(name, tensor, hidden.shape[0])
        check_dtype(name, tensor, torch.int64)
    check_device(hidden, weight=weight, keys=keys, attempt=attempt, position=position)
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise ValueError(f"temperature is {temperature}, expected {MIN_TEMPERATURE} to {MAX_TEMPERATURE}")
    if not 0 <= stream < 256:
        raise ValueError(f"stream is {stream}, expected 0 to 255")
    return call_op(_NAME, hidden, weight, keys, attempt, position, temperature, stream)


def lm_head_sample_ref(
    hidden: Tensor, weight: Tensor, keys: Tensor, attempt: Tensor, position: Tensor, temperature: float, stream: int
) -> tuple[Tensor, Tensor]:
    """The definition."""
    return segment_sample_ref(hidden @ weight.T, keys, attempt, position, None, temperature, 0, 1.0, 0.0, stream)


def _fake(hidden: Tensor, weight: Tensor, keys: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    rows = keys.shape[0]
    return hidden.new_empty(rows, dtype=torch.int64), hidden.new_empty(rows, dtype=torch.float32)


_NAME = define_op(
    "lm_head_sample(Tensor hidden, Tensor weight, Tensor keys, Tensor attempt, Tensor position, float temperature, "
    "int stream) -> (Tensor token, Tensor logprob)",
    lm_head_sample_ref,
    _fake,
)
