"""stars_kernels on token ids: a living engine, an engine for one call, and a count of the engine's forwards."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from bench.common import Result
from bench.machine import Forward
from bench.models import Models
from stars_kernels import StarsConfig, decode

Prompts = Sequence[Sequence[int]]


def ours_decode(models: Models, prompts: Prompts, config: StarsConfig) -> list[Result]:
    """Decode by the models' engine, which loads and packs nothing any more; request ids are the prompts' places."""
    ids = range(len(prompts))
    return [Result.of(output) for output in models.engine.decode(list(prompts), config=config, request_ids=ids)]


def decode_once(models: Models, prompts: Prompts, config: StarsConfig) -> list[Result]:
    """Decode by `stars_kernels.decode`, which makes an engine for this call."""
    ids = range(len(prompts))
    outputs = decode(models.model, models.rm, list(prompts), config=config, request_ids=ids)
    return [Result.of(output) for output in outputs]


@contextmanager
def counted(models: Models) -> Iterator[list[Forward]]:
    """Give a list that gets an entry for each forward of the engine's models, but for those inside of graphs."""
    forwards: list[Forward] = []
    views, (rm_view,) = models.engine.models, models.engine.models.rewarder.bodies
    handles = [
        *_count(views.lm, models.model.model.layers, models.model.lm_head, forwards),
        *_count(rm_view, models.rm.model.layers, None, forwards),
    ]
    try:
        yield forwards
    finally:
        for handle in handles:
            handle.remove()


def _count(view: nn.Module, body: nn.Module, head: nn.Module | None, forwards: list[Forward]) -> list[Any]:
    """Append an entry for each call of `view`; returns the hooks' handles.

    body: the original's layers, whose weights are packed out of sight in the view. head: its output layer if it counts.
    """
    body_size = sum(p.numel() for p in body.parameters())
    head_size = 0 if head is None else sum(p.numel() for p in head.parameters())
    item = next(body.parameters()).element_size()

    began = 0.0

    def start(module: nn.Module, args: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def note(module: nn.Module, args: Any, given: dict[str, Any], output: Any) -> None:
        seconds = time.perf_counter() - began
        tokens = given["input_ids"].numel()
        read = 0 if head is None else output.logits[..., 0].numel()
        flops = 2 * (body_size * tokens + head_size * read)
        forwards.append(Forward((body_size + head_size) * item, flops, seconds))

    return [view.register_forward_pre_hook(start), view.register_forward_hook(note, with_kwargs=True)]
