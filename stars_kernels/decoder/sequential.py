"""The definition: decoding by a rule as one would write it on paper, one prompt and one attempt at a time.

No keys and values are kept and nothing is batched: every token is a forward of the whole text. The engine decodes many
attempts and prompts at once from stored prefixes and gives the same answers; tests and demo compare it with this.
"""

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.draws import draw, entropy
from stars_kernels.decoder.rules import Candidate, Plan, Rule
from stars_kernels.ops.philox import accept_uniforms


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

    def grow(plan: Plan, attempt: int) -> Candidate:
        """Draw attempt number `attempt` at the next tokens; its random numbers depend on that number alone."""
        tokens, logprob, stopped, number = list[int](), 0.0, False, answer.number(plan, attempt)
        while len(tokens) < answer.size(plan) and not stopped and (not tokens or tokens[-1] not in eos):
            so_far = answer.tokens + tokens
            row = logits(so_far)
            if tokens and plan.entropy is not None and entropy(row) >= plan.entropy:
                break
            token, log_p = draw(row, plan.draw, answer.key, number, len(so_far), sampling)
            tokens.append(token)
            logprob += log_p
            stopped = stops([*so_far, token])
        (uniform,) = accept_uniforms([answer.key], [len(answer.tokens)], [number])
        return Candidate(tokens, reward(answer.tokens + tokens), uniform, stopped, logprob=logprob)

    answer.reward = answer.prompt_reward = reward([])
    while answer.active:
        plan = rule.plan(answer)
        for attempt in range(plan.attempts):
            candidate = grow(plan, attempt)
            verdict = rule.judge(answer, [*answer.candidates, candidate])
            answer.add([candidate], [verdict], width=1)
            if verdict.outcome is not None:
                break
        answer.take(verdict, eos)
    return answer
