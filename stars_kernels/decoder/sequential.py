"""The definition: decoding by a rule as one would write it on paper, one prompt and one attempt at a time.

Nothing is kept but tokens, and nothing is batched. The engine decodes many attempts and prompts at once from stored
prefixes, and gives the same answers; tests, demo and benchmarks compare it with this.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.rules import Candidate, Rule
from stars_kernels.ops.philox import STREAM_SAMPLE, accept_uniform
from stars_kernels.ops.segment_sample import segment_sample_ref


def decode(
    logits: Callable[[list[int]], Tensor],
    reward: Callable[[list[int]], float],
    rule: Rule,
    *,
    key: int,
    max_new_tokens: int,
    sampling: dict[str, Any],
    eos: Collection[int] = (),
    stops: Callable[[list[int]], bool] = lambda tokens: False,
) -> Answer:
    """Decode one answer to a prompt that `logits` and `reward` know.

    Args:
        logits: answer tokens -> the logits [V] of the next one.
        reward: answer tokens -> the reward of prompt and answer.
        rule: with r* and beta, where it has any.
        key: of the request's random numbers (`ops.philox.request_key`).
        max_new_tokens: tokens of the answer, at most.
        sampling: temperature, top_k, top_p and min_p (`StarsConfig.sampling`).
        eos: tokens that end the answer.
        stops: answer tokens -> whether the last of them ends the answer.
    """
    filters = (sampling["temperature"], sampling["top_k"], sampling["top_p"], sampling["min_p"])

    def sample(answer: Answer, attempt: int, size: int) -> Candidate:
        """Attempt number `attempt` at the answer's next `size` tokens: its randomness is that of its number alone."""
        tokens: list[int] = []
        stopped = False
        while len(tokens) < size and not stopped and (not tokens or tokens[-1] not in eos):
            so_far = answer.tokens + tokens
            keys, attempts, positions = (torch.tensor([number]) for number in (key, attempt, len(so_far)))
            row = logits(so_far)[None]  # [1, V]
            token, _ = segment_sample_ref(row, keys, attempts, positions, None, *filters, STREAM_SAMPLE)
            tokens.append(int(token))
            stopped = stops(so_far + tokens[-1:])
        numbers = (torch.tensor(number) for number in (key, len(answer.tokens), attempt))
        return Candidate(tokens, reward(answer.tokens + tokens), accept_uniform(*numbers).item(), stopped)

    answer = Answer(key, prompt=(), limit=max_new_tokens)
    answer.reward = answer.prompt_reward = reward([])
    while answer.active:
        plan = rule.plan(answer)
        while True:
            candidate = sample(answer, len(answer.candidates), answer.size(plan))
            verdict = rule.judge(answer, [*answer.candidates, candidate])
            answer.add([candidate], verdict, width=1)
            if verdict.outcome is not None:
                break
        answer.take(verdict, eos)
    return answer
