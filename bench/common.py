"""What the contestants share: their result, the draw, cache surgery."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bench.report import CheckError
from stars_kernels import StarsConfig, StarsOutput, backends
from stars_kernels.decoder.answer import Answer
from stars_kernels.hf.view.layout import cache_argument
from stars_kernels.ops import segment_sample

Sampler = Callable[[Tensor, Sequence[int], Sequence[int], int], Tensor]
"""(logits [R, V], prompt of each row, attempt of each row, position in the answer) -> tokens [R]."""
KeysAndValues = list[tuple[Tensor, Tensor]]
"""A piece of a cache: keys and values [rows, heads, tokens, D] of each layer."""


@dataclass
class Result:
    token_ids: list[int] = field(default_factory=list)
    """The answer's tokens, EOS included."""
    reward: float = math.nan
    """The deciding reward of the answer."""
    attempts: list[int] = field(default_factory=list)
    """Attempts judged, segment by segment."""

    @staticmethod
    def of(answer: Answer | StarsOutput) -> Result:
        tokens = answer.tokens if isinstance(answer, Answer) else answer.token_ids
        return Result(tokens, answer.reward, [segment.attempts for segment in answer.segments])


def sampler(config: StarsConfig, keys: Sequence[int] | None) -> Sampler:
    """Make a draw by transformers' warpers and multinomial; with keys (one per prompt), of the engine's own tokens."""
    if keys is None:
        warpers = LogitsProcessorList()
        if config.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p is not None and config.top_p < 1.0:
            warpers.append(TopPLogitsWarper(config.top_p))
        if config.min_p:
            warpers.append(MinPLogitsWarper(config.min_p))

    def draw(logits: Tensor, prompts: Sequence[int], attempts: Sequence[int], position: int) -> Tensor:
        if keys is None:
            return warpers(None, logits.float()).softmax(dim=-1).multinomial(1).squeeze(1)
        own = torch.tensor([keys[p] for p in prompts], device=logits.device)
        attempt = torch.tensor(attempts, device=logits.device)
        return segment_sample(logits, own, attempt, torch.full_like(own, position), **config.sampling)[0]

    return draw


def check_plain(config: StarsConfig) -> None:
    """Refuse ends of answers: the contestants with caches leave out what the benchmark does not use."""
    if config.eos_token_id != () or config.stop_strings:
        raise ValueError("expected eos_token_id=() and no stop strings")


def check_triton() -> None:
    """Refuse to time a GPU but with the Triton kernels: definitions serve where these are missing."""
    expected = ("fork_attention", "kv_commit", "lm_head_sample", "reward_head", "segment_sample")
    wrong = {op: found for op in expected if (found := backends()[op]["cuda"]) != "triton"}
    if (found := backends()["accept"]["cuda"]).startswith("definition"):  # CUDA has one as well
        wrong["accept"] = found
    if wrong:
        raise CheckError(f"expected Triton kernels on cuda, found {wrong}")


def prefill(
    model: PreTrainedModel, rm: PreTrainedModel, ids: Tensor
) -> tuple[DynamicCache, Tensor, DynamicCache, Tensor]:
    """Read the prompts [P, N]: LM cache, the next token's logits [P, V], RM cache, rewards [P]."""
    cache, rm_cache = DynamicCache(), DynamicCache()
    logits = model(input_ids=ids, **{cache_argument(model): cache}, logits_to_keep=1).logits[:, -1]
    return cache, logits, rm_cache, cached_rewards(rm, rm_cache, ids)


def cached_rewards(rm: PreTrainedModel, cache: DynamicCache, ids: Tensor) -> Tensor:
    """Compute the rewards [R] at the last of the new tokens `ids` [R, S]; `cache` grows by them."""
    hidden = rm.model(input_ids=ids, **{cache_argument(rm.model): cache}).last_hidden_state
    return rm.score(hidden[:, -1])[:, 0]


def fork(cache: DynamicCache, rows: Sequence[int]) -> DynamicCache:
    """Copy the given rows of the cache; the cache itself stays."""
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    forked.batch_select_indices(torch.tensor(rows, device=cache.layers[0].keys.device))
    return forked


def tail(cache: DynamicCache, row: int, start: int) -> KeysAndValues:
    """Copy the keys and values [1, heads, tokens, D] of one row from token `start` on."""
    part = (slice(row, row + 1), slice(None), slice(start, None))
    return [(layer.keys[part].clone(), layer.values[part].clone()) for layer in cache.layers]


def append(cache: DynamicCache, tails: Sequence[KeysAndValues]) -> None:
    """Put tails of one length behind the cache: one for each of its rows."""
    for index, pieces in enumerate(zip(*tails, strict=True)):
        keys, values = zip(*pieces, strict=True)
        cache.update(torch.cat(keys), torch.cat(values), index)
