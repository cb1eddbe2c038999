"""ARGS (arXiv 2402.01694): each token is the one with the best sum of its log-probability and its reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stars_kernels.decoder.checks import check_count, check_number
from stars_kernels.decoder.rules.rule import AnswerSoFar, Candidate, Plan, Verdict
from stars_kernels.ops.philox import MAX_ATTEMPTS


@dataclass(frozen=True)
class Args:
    """Of the k likeliest next tokens, take the one with the highest log p(token) + w * reward (ARGS-greedy).

    Attempt a is the token with the a-th largest logit, of equal ones the smaller id; p is softmax(logits) at
    temperature 1, after any logits processors; the reward is of the answer with the token. Of equal scores the lower
    attempt is taken; a score that is no number, as of w = 0 times an infinite reward, is below all others.

    Nothing is random: temperature, top_k, top_p, min_p and seed have no part in it. k is at most the vocabulary. The
    paper's code adds the logit, where this adds its log-probability: the same choice, as the two differ by a constant.
    """

    k: int = 10
    w: float = 1.0

    def __post_init__(self) -> None:
        check_count(self, "k", MAX_ATTEMPTS)
        check_number(self, "w", lambda x: True, "a finite number")

    def plan(self, answer: AnswerSoFar) -> Plan:
        return Plan(1, self.k, draw="likeliest")

    def judge(self, answer: AnswerSoFar, candidates: Sequence[Candidate]) -> Verdict:
        scores = [self.score(candidate) for candidate in candidates]
        return Verdict(scores.index(max(scores)), "best" if len(candidates) == self.k else None)

    def score(self, candidate: Candidate) -> float:
        """Return log p + w * reward, -inf where it is no number."""
        score = candidate.logprob + self.w * candidate.reward
        return -math.inf if math.isnan(score) else score
