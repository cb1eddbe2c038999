"""The output layer: what it reads at chosen tokens, and whether it can be fused with the draw.

A draw needs no stored logits where these are what the output layer returns and nothing else: no soft-cap, no scale, no
bias. That is asked of the model itself, by values planted into its forward, as every family and every release of
transformers writes the end of its forward in its own way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stars_kernels.hf.cache import open_cache
from stars_kernels.hf.modes import without_autocast
from stars_kernels.hf.view.logits import logits_of
from stars_kernels.hf.view.rewrites.matching import has_hooks, is_plain

PLANTED_ROWS = 8
"""Rows of the probe, each of values ten or more times as large as those of the row before."""
SMALLEST = 1e-4
"""The size of the values in the first row; in the last it is a tenth of what the dtype can hold."""


def hidden_of(model: PreTrainedModel, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Compute what the output layer reads at the last token, [B, 1, D], by the model's own forward without that layer.

    Only for a model that `why_unfused` has nothing against.
    """
    with _answering(model.get_output_embeddings(), lambda x: x):
        return logits_of(model, ids, inputs, 1)


@torch.no_grad()
@without_autocast()
def why_unfused(model: PreTrainedModel) -> str | None:
    """Say why a view's logits are not hidden weight^T alone, with the plain weight [V, D] of its output layer.

    The forward is run as a draw would run it, on a few rows of one token. In place of its output layer stand planted
    logits, and then planted hidden states as in `hidden_of`; both must come out as they went in, bit for bit. The rows
    cover the dtype, so a cap, a clamp or a scale that could change any logit changes one of these.

    Returns:
        The reason, or None where a draw can be fused. Nothing is left behind on the view or the model.
    """
    head, name = model.get_output_embeddings(), type(model).__name__
    if not is_plain(head, nn.Linear):
        return f"the output layer of {name} is a {type(head).__name__}, expected a torch.nn.Linear without hooks"
    if head.bias is not None:
        return f"the output layer of {name} has a bias"
    if type(head.weight) is not nn.Parameter:
        return f"the output layer of {name} has a {type(head.weight).__name__} as its weight, expected a Parameter"
    if has_hooks(model):
        return f"{name} has hooks, which may read or change its logits"
    sizes = {"logits": head.weight.shape[0], "hidden states": head.weight.shape[1]}
    cache = open_cache(model, [1], 1)
    try:
        one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        with cache.prefill([0], [1]) as inputs:
            model(input_ids=one, **inputs)
        for what, size in sizes.items():
            planted, reads = _planted(size, head.weight), list[Tensor]()

            def answer(x: Tensor) -> Tensor:
                reads.append(x)  # noqa: B023
                return planted.clone()  # noqa: B023  # as it may be changed in place

            cache.fork(one[0].expand(PLANTED_ROWS))
            with _answering(head, answer), cache.extend(1) as inputs:
                found = logits_of(model, one.expand(PLANTED_ROWS, 1), inputs, 1)
            if [tuple(x.shape[:2]) for x in reads] != [(PLANTED_ROWS, 1)] or reads[0].dtype != head.weight.dtype:
                calls = [f"{list(x.shape)} in {x.dtype}" for x in reads]
                return f"{name} calls its output layer on {' and '.join(calls) or 'nothing'} in a step of one token"
            if found.dtype != planted.dtype or not torch.equal(found, planted):
                return f"{name} changes the {what} behind its output layer"
    finally:
        cache.close()
    return None


@contextmanager
def _answering(head: nn.Module, answer: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Run `answer` in place of the layer's forward in this block."""
    head.forward = answer
    try:
        yield
    finally:
        del head.forward


def _planted(size: int, like: Tensor) -> Tensor:
    """Make random numbers [PLANTED_ROWS, 1, size] of both signs, each row larger, up to what the dtype can hold."""
    largest = math.log10(torch.finfo(like.dtype).max) - 1
    scales = torch.logspace(math.log10(SMALLEST), largest, PLANTED_ROWS, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(PLANTED_ROWS, size, dtype=torch.float64, generator=generator) * 2 - 1
    return (uniform * scales[:, None])[:, None].to(like)
