"""The loop of someone who knows caches: nothing is read twice, but attempts still go one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from bench.common import Result, append, cached_rewards, check_plain, prefill, sampler, tail
from demo.naive import judge_attempt
from stars_kernels import StarsConfig
from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.rules import Candidate
from stars_kernels.hf.view.layout import cache_argument
from stars_kernels.ops.philox import accept_uniforms


@torch.inference_mode()
def cached_decode(
    model: PreTrainedModel,
    rm: PreTrainedModel,
    prompt_ids: Sequence[int],
    config: StarsConfig,
    key: int,
    seeded: bool = True,
) -> Result:
    """STARS with a DynamicCache for each model, cropped after an attempt; arguments as in `naive_decode`.

    Answers do not end on a token: config.eos_token_id must be ().
    """
    check_plain(config)
    draw = sampler(config, [key] if seeded else None)
    rule, answer = config.resolved_rule, Answer(key, prompt_ids, config.max_new_tokens)
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    cache, prefix_logits, rm_cache, rewards = prefill(model, rm, ids)
    answer.prompt_reward = float(rewards)
    while answer.active:
        position = len(answer.tokens)
        if position:  # the last accepted token is not read yet
            ids = torch.tensor([answer.tokens[-1:]], device=model.device)
            prefix_logits = model(input_ids=ids, **{cache_argument(model): cache}).logits[:, -1]
        start, rm_start = cache.get_seq_length(), rm_cache.get_seq_length()
        size = answer.size(rule.plan(answer))
        while len(answer.tokens) == position:
            logits, steps = prefix_logits, []
            for step in range(size):
                token = draw(logits, [0], [len(answer.candidates)], position + step)
                steps.append(token)
                if step < size - 1:  # nothing follows the last token in this attempt
                    logits = model(input_ids=token[:, None], **{cache_argument(model): cache}).logits[:, -1]
            tokens = torch.stack(steps, dim=1)  # [1, size]
            reward = float(cached_rewards(rm, rm_cache, tokens))
            (uniform,) = accept_uniforms([key], [position], [len(answer.candidates)])
            if judge_attempt(answer, rule, Candidate(tokens[0].tolist(), reward, uniform)):
                best_tails = (tail(cache, 0, start), tail(rm_cache, 0, rm_start))
            _crop(cache, start)
            _crop(rm_cache, rm_start)
        append(cache, best_tails[:1])
        append(rm_cache, best_tails[1:])
    return Result.of(answer)


def _crop(cache: DynamicCache, length: int) -> None:
    if cache.get_seq_length() > length:
        cache.crop(length - cache.get_seq_length())  # a negative number is how many to remove
