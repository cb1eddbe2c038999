"""What the hand-written contestants share: the draw, the decision on an attempt, cache surgery."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from stars_kernels import StarsConfig, backends
from stars_kernels.hf.view.layout import cache_argument
from stars_kernels.ops import segment_sample
from stars_kernels.ops.philox import accept_uniform

Judge = Callable[[int, int, float], float]
"""(segment, attempt, the reward model's reward) -> the reward that decides."""
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
    """Attempts judged, for each segment."""


def generate_options(config: StarsConfig) -> dict[str, Any]:
    """The config's draw as keywords of `model.generate`."""
    return {
        "do_sample": True,
        "temperature": config.temperature,
        "top_k": config.top_k or 0,
        "top_p": 1.0 if config.top_p is None else config.top_p,
        "min_p": config.min_p or None,  # 0.0 would cost transformers a pass over the vocabulary
    }


def sampler(config: StarsConfig, keys: Sequence[int] | None) -> Sampler:
    """transformers' warpers and a multinomial draw; with keys (one a prompt), exactly the engine's tokens."""
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


class Decision:
    """STARS' choice among the attempts at one segment of one prompt, in the order they are tried."""

    def __init__(
        self, config: StarsConfig, prompt_reward: float, position: int, key: int | None, judge: Judge | None
    ) -> None:
        self.config, self.prompt_reward, self.position = config, prompt_reward, position
        self.key, self.judge = key, judge
        self.attempts = 0
        self.reward = -math.inf
        """Of the attempt that is taken, or of the best so far."""
        self.done = False

    def take(self, reward: float, length: int) -> bool:
        """Judge the next attempt, of `length` tokens: whether it is the one to keep, for good or for now."""
        config, attempt = self.config, self.attempts
        if self.judge is not None:
            reward = self.judge(self.position // config.segment_size, attempt, reward)
        self.attempts += 1
        accepted = self._accepts(reward, length, attempt)
        self.done = accepted or self.attempts == config.max_attempts
        better = accepted or attempt == 0 or reward > self.reward
        self.reward = reward if better else self.reward
        return better

    def _accepts(self, reward: float, length: int, attempt: int) -> bool:
        config = self.config
        target, beta = config.reward_threshold, config.beta
        assert target is not None and beta is not None, "no calibration here: give reward_threshold and beta"
        start = (1 - config.alpha) * self.prompt_reward + config.alpha * target
        tau = start + (self.position + length) * (target - start) / config.max_new_tokens
        tau = min(target, tau)
        if config.accept == "hard":
            return reward >= tau
        if self.key is None:
            uniform = torch.rand(()).item()
        else:
            counter = (torch.tensor(n) for n in (self.key, self.position, attempt))
            uniform = accept_uniform(*counter).item()
        return uniform < math.exp(min(0.0, (reward - tau) / beta))


def check_plain(config: StarsConfig) -> None:
    """The contestants with caches leave out what the benchmark does not use: the ends of answers."""
    if config.eos_token_id != () or config.stop_strings:
        raise ValueError("expected eos_token_id=() and no stop strings")


def check_triton() -> None:
    """A GPU is timed with the Triton kernels alone, never with the definitions that serve where they are missing."""
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
    """The rewards [R] at the last of the new tokens `ids` [R, S]; `cache` grows by them."""
    hidden = rm.model(input_ids=ids, **{cache_argument(rm.model): cache}).last_hidden_state
    return rm.score(hidden[:, -1])[:, 0]


def fork(cache: DynamicCache, rows: Sequence[int]) -> DynamicCache:
    """A copy of the given rows of the cache; the cache itself stays."""
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    forked.batch_select_indices(torch.tensor(rows, device=cache.layers[0].keys.device))
    return forked


def tail(cache: DynamicCache, row: int, start: int) -> KeysAndValues:
    """The keys and values [1, heads, tokens, D] of one row from token `start` on, as a copy."""
    part = (slice(row, row + 1), slice(None), slice(start, None))
    return [(layer.keys[part].clone(), layer.values[part].clone()) for layer in cache.layers]


def append(cache: DynamicCache, tails: Sequence[KeysAndValues]) -> None:
    """Put tails of one length behind the cache: one for each of its rows."""
    for index, pieces in enumerate(zip(*tails, strict=True)):
        keys, values = zip(*pieces, strict=True)
        cache.update(torch.cat(keys), torch.cat(values), index)
