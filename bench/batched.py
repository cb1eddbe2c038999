"""The strongest loop on transformers' own cache: attempts side by side, each on a copy of the prompt's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from bench.common import KeysAndValues, Result, append, cached_rewards, check_plain, fork, prefill, sampler, tail
from demo.naive import judge_attempt
from stars_kernels import StarsConfig
from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.rules import Candidate
from stars_kernels.hf.view.layout import cache_argument
from stars_kernels.ops.philox import accept_uniforms


@torch.inference_mode()
def batched_decode(
    model: PreTrainedModel,
    rm: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    config: StarsConfig,
    rows: int,
    keys: Sequence[int],
    seeded: bool = True,
) -> list[Result]:
    """STARS on prompts of EQUAL length, about `rows` attempts per round; other arguments as in `naive_decode`.

    A DynamicCache is a rectangle, so the prompts go from segment to segment together: those that are decided
    leave their share of the rows to the others, and wait. Answers do not end on a token: config.eos_token_id
    must be ().
    """
    check_plain(config)
    draw = sampler(config, keys if seeded else None)
    rule = config.resolved_rule
    cache, prefix_logits, rm_cache, prompt_rewards = prefill(model, rm, torch.tensor(prompts, device=model.device))
    answers = [
        Answer(key, prompt, config.max_new_tokens, prompt_reward=reward)
        for key, prompt, reward in zip(keys, prompts, prompt_rewards.tolist(), strict=True)
    ]
    while answers[0].active:
        position = len(answers[0].tokens)
        if position:  # the last accepted tokens are not read yet
            last = torch.tensor([answer.tokens[-1:] for answer in answers], device=model.device)
            prefix_logits = model(input_ids=last, **{cache_argument(model): cache}).logits[:, -1]
        start, rm_start = cache.get_seq_length(), rm_cache.get_seq_length()
        plan = rule.plan(answers[0])
        size = answers[0].size(plan)
        tails: list[KeysAndValues] = [[]] * len(answers)
        rm_tails: list[KeysAndValues] = [[]] * len(answers)
        while undecided := [p for p, answer in enumerate(answers) if len(answer.tokens) == position]:
            width = max(rows // len(undecided), 1)
            row_prompts: list[int] = []
            row_attempts: list[int] = []
            for p in undecided:
                first = len(answers[p].candidates)
                attempts = range(first, min(first + width, plan.attempts))
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
            uniforms = accept_uniforms([keys[p] for p in row_prompts], [position] * len(row_prompts), row_attempts)
            for row, p in enumerate(row_prompts):
                answer = answers[p]
                if len(answer.tokens) > position:  # decided by an attempt before
                    continue
                candidate = Candidate(tokens[row].tolist(), rewards[row], uniforms[row])
                if judge_attempt(answer, rule, candidate):
                    tails[p], rm_tails[p] = tail(forked, row, start), tail(rm_forked, row, rm_start)
        append(cache, tails)
        append(rm_cache, rm_tails)
    return [Result.of(answer) for answer in answers]
