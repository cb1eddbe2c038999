"""The loop one would write by hand: `generate` a segment, score the whole text, repeat if rejected."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from bench.common import Decision, Judge, Result, Sampler, generate_options, sampler
from stars_kernels import StarsConfig
from stars_kernels.hf.loading.language_model import eos_ids


class _Seeded(LogitsProcessor):
    """Leaves one token to choose from: the one the engine draws for this attempt at this position."""

    def __init__(self, draw: Sampler, attempt: int, prompt_length: int) -> None:
        self.draw, self.attempt, self.prompt_length = draw, attempt, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.draw(scores, [0], [self.attempt], input_ids.shape[1] - self.prompt_length)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


@torch.inference_mode()
def naive_decode(
    model: PreTrainedModel,
    rm: PreTrainedModel | Callable[[Tensor], float],
    prompt_ids: Sequence[int],
    config: StarsConfig,
    key: int | None = None,
    judge: Judge | None = None,
) -> Result:
    """STARS with nothing kept between attempts; one prompt, one attempt at a time.

    Args:
        rm: a sequence classifier on the same token ids, its first output is the reward; or a function of them, [1, N].
        config: with reward_threshold and beta; width and stop strings are not for this loop.
        key: the request's Philox key, for the engine's tokens and decisions; None = torch's own randomness.
        judge: what decides in place of the reward, which is computed all the same.
    """
    if config.stop_strings:
        raise ValueError("the naive loop knows no stop strings")
    eos = eos_ids(model) if config.eos_token_id is None else config.eos_token_id
    ids = torch.tensor([list(prompt_ids)], device=model.device)  # [1, N]
    prompt_length, limit = ids.shape[1], ids.shape[1] + config.max_new_tokens
    prompt_reward = _reward(rm, ids)
    result = Result(reward=prompt_reward)
    while ids.shape[1] < limit and not (ids.shape[1] > prompt_length and int(ids[0, -1]) in eos):
        decision = Decision(config, prompt_reward, ids.shape[1] - prompt_length, key, judge)
        size = min(config.segment_size, limit - ids.shape[1])
        best = ids
        while not decision.done:
            how = generate_options(config)
            if key is not None:
                seeded = _Seeded(sampler(config, [key]), decision.attempts, prompt_length)
                how = {"do_sample": True, "top_k": 0, "logits_processor": LogitsProcessorList([seeded])}
            candidate = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=size,
                eos_token_id=list(eos) or None,
                **how,
            )
            if decision.take(_reward(rm, candidate), candidate.shape[1] - ids.shape[1]):
                best = candidate
        ids = best
        result.reward = decision.reward
        result.attempts.append(decision.attempts)
    result.token_ids = ids[0, prompt_length:].tolist()
    return result


def _reward(rm: PreTrainedModel | Callable[[Tensor], float], ids: Tensor) -> float:
    if not isinstance(rm, nn.Module):
        return rm(ids)
    return float(rm(input_ids=ids, use_cache=False).logits[0, 0])
