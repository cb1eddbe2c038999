"""The definition: decoding by a rule as one would write it on paper, one prompt and one attempt at a time.

No keys and values are kept and nothing is batched: every token is a forward of the whole text. The engine decodes many
attempts and prompts at once from stored prefixes and gives the same answers; tests and demo compare it with this.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
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
    """Decode one answer, which starts empty; logits(answer tokens): [V] of the next token behind the prompt and these.

    reward(tokens): of the answer. stops(tokens): whether the last of them ends it; so do those in eos.
    """

    def grow(plan: Plan, start: Candidate) -> Candidate:
        """Let an attempt grow by the plan's tokens; its random numbers depend on its number alone."""
        tokens, logprob, stopped, ended = list(start.tokens), start.logprob, False, False
        number, end = answer.number(plan, start.attempt), len(tokens) + answer.size(plan)
        while len(tokens) < end and not ended:
            so_far = answer.tokens + tokens
            row = logits(so_far)
            if len(tokens) > start.held and plan.entropy is not None and entropy(row) >= plan.entropy:
                break
            token, log_p = draw(row, plan.draw, answer.key, number, len(so_far), sampling)
            tokens, logprob, stopped = [*tokens, token], logprob + log_p, stops([*so_far, token])
            ended = stopped or token in eos or len(tokens) == answer.room
        (u,) = accept_uniforms([answer.key], [len(answer.tokens)], [number])
        score = reward(answer.tokens + tokens)
        return replace(start, tokens=tokens, logprob=logprob, reward=score, uniform=u, stopped=stopped, ended=ended)

    answer.reward = answer.prompt_reward = reward([])
    while answer.active:
        plan = rule.plan(answer)
        for start in answer.starts(answer.left(plan)):
            candidate = grow(plan, start)
            verdict = rule.judge(answer, [*answer.candidates, candidate])
            answer.add([candidate], [verdict], width=1)
            if verdict.outcome is not None:
                break
        answer.follow(verdict, eos)
    return answer
