"""The definition: decoding by a rule as one would write it on paper, one prompt and one attempt at a time.

No keys and values are kept and nothing is batched: every token is a forward of the whole text. The engine decodes many
attempts and prompts at once from stored prefixes and gives the same answers; tests and demo compare it with this.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.rules import Candidate, Rule
from stars_kernels.ops.philox import STREAM_SAMPLE, accept_uniforms
from stars_kernels.ops.segment_sample import segment_sample_ref


def decode(
    logits: Callable[[list[int]], Tensor],
    reward: Callable[[list[int]], float],
    rule: Rule,
    answer: Answer,
    sampling: dict[str, Any],
    eos: Collection[int] = (),
    stops: Callable[[list[int]], bool] = lambda tokens: False,
) -> Answer:
    """Decode the empty `answer`, to a prompt that `logits` (answer tokens -> [V], of the next) and `reward` know.

    sampling: temperature, top_k, top_p, min_p. eos: tokens that end the answer. stops: whether its last token ends it.
    """
    filters = (sampling["temperature"], sampling["top_k"], sampling["top_p"], sampling["min_p"])

    def sample(attempt: int, size: int) -> Candidate:
        """Sample attempt number `attempt` at the next `size` tokens; its random numbers depend on that number alone."""
        tokens: list[int] = []
        stopped = False
        while len(tokens) < size and not stopped and (not tokens or tokens[-1] not in eos):
            so_far = answer.tokens + tokens
            keys, attempts, positions = (torch.tensor([number]) for number in (answer.key, attempt, len(so_far)))
            row = logits(so_far)[None]  # [1, V]
            token, _ = segment_sample_ref(row, keys, attempts, positions, None, *filters, STREAM_SAMPLE)
            tokens.append(int(token))
            stopped = stops(so_far + tokens[-1:])
        (uniform,) = accept_uniforms([answer.key], [len(answer.tokens)], [attempt])
        return Candidate(tokens, reward(answer.tokens + tokens), uniform, stopped)

    answer.reward = answer.prompt_reward = reward([])
    while answer.active:
        plan = rule.plan(answer)
        for attempt in range(plan.attempts):
            candidate = sample(attempt, answer.size(plan))
            verdict = rule.judge(answer, [*answer.candidates, candidate])
            answer.add([candidate], verdict, width=1)
            if verdict.outcome is not None:
                break
        answer.take(verdict, eos)
    return answer
