"""The strongest loop on transformers' own cache: attempts side by side, each on a copy of the prompt's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from bench.common import (
    Decision,
    Judge,
    KeysAndValues,
    Result,
    append,
    cached_rewards,
    check_plain,
    fork,
    prefill,
    sampler,
    tail,
)
from stars_kernels import StarsConfig
from stars_kernels.hf.view.layout import cache_argument


@torch.inference_mode()
def batched_decode(
    model: PreTrainedModel,
    rm: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    config: StarsConfig,
    rows: int,
    keys: Sequence[int] | None = None,
    judges: Sequence[Judge | None] | None = None,
) -> list[Result]:
    """STARS on prompts of EQUAL length, about `rows` attempts a round; other arguments as in `naive_decode`.

    A DynamicCache is a rectangle, so the prompts go from segment to segment together: those that are decided
    leave their share of the rows to the others, and wait. Answers do not end on a token: config.eos_token_id
    must be ().
    """
    check_plain(config)
    draw = sampler(config, keys)
    count = len(prompts)
    cache, prefix_logits, rm_cache, prompt_rewards = prefill(model, rm, torch.tensor(prompts, device=model.device))
    results = [Result(reward=reward) for reward in prompt_rewards.tolist()]
    for position in range(0, config.max_new_tokens, config.segment_size):
        if position:  # the last accepted tokens are not read yet
            last = torch.tensor([result.token_ids[-1:] for result in results], device=model.device)
            prefix_logits = model(input_ids=last, **{cache_argument(model): cache}).logits[:, -1]
        start, rm_start = cache.get_seq_length(), rm_cache.get_seq_length()
        size = min(config.segment_size, config.max_new_tokens - position)
        decisions = [
            Decision(
                config,
                prompt_rewards[p].item(),
                position,
                None if keys is None else keys[p],
                None if judges is None else judges[p],
            )
            for p in range(count)
        ]
        best: list[list[int]] = [[]] * count
        tails: list[KeysAndValues] = [[]] * count
        rm_tails: list[KeysAndValues] = [[]] * count
        while undecided := [p for p in range(count) if not decisions[p].done]:
            width = max(rows // len(undecided), 1)
            row_prompts: list[int] = []
            row_attempts: list[int] = []
            for p in undecided:
                first = decisions[p].attempts
                attempts = range(first, min(first + width, config.max_attempts))
                row_prompts += [p] * len(attempts)
                row_attempts += attempts
            forked, rm_forked = fork(cache, row_prompts), fork(rm_cache, row_prompts)
            logits, steps = prefix_logits[row_prompts], []
            for step in range(size):
                steps.append(draw(logits, row_prompts, row_attempts, position + step))
                if step < size - 1:  # nothing follows the last tokens in this round
                    logits = model(input_ids=steps[-1][:, None], **{cache_argument(model): forked}).logits[:, -1]
            tokens = torch.stack(steps, dim=1)  # [R, size]
            rewards = cached_rewards(rm, rm_forked, tokens).tolist()
            for row, p in enumerate(row_prompts):
                if not decisions[p].done and decisions[p].take(rewards[row], size):
                    best[p] = tokens[row].tolist()
                    tails[p], rm_tails[p] = tail(forked, row, start), tail(rm_forked, row, rm_start)
        append(cache, tails)
        append(rm_cache, rm_tails)
        for result, decision, chosen in zip(results, decisions, best, strict=True):
            result.token_ids += chosen
            result.reward = decision.reward
            result.attempts.append(decision.attempts)
    return results
