"""The figures of a rule: its rewards, how it came off against plain sampling, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stars_kernels.evaluation.answers import Answer
from stars_kernels.evaluation.statistics import Estimate, estimate, length_controlled
from stars_kernels.evaluation.verdicts import Answers, Outcome

BASE = "plain"
"""The rule that the others are compared with, by its name."""
HALF = {"win": 1.0, "tie": 0.5, "loss": 0.0}
"""What a pair counts in a win rate."""


@dataclass(frozen=True)
class AgainstPlain:
    """A rule's answers against plain sampling's, as a judge sees them.

    wins, ties, losses: pairs. unreadable, failed: pairs on which a verdict cannot be read, or is missing; they count
    nowhere else. win_rate: wins and half the ties, of the pairs that were judged. flip_rate: of the pairs that were
    asked in both orders, the share where these disagree. not_longer: pairs in which its answer is not longer than
    plain sampling's; win_rate_not_longer: of these. length_controlled: the win rate expected at equal lengths (see
    `statistics.length_controlled`), None where there are not enough pairs to tell.
    """

    wins: int
    ties: int
    losses: int
    unreadable: int
    failed: int
    win_rate: Estimate | None
    flip_rate: float | None
    not_longer: int
    win_rate_not_longer: float | None
    length_controlled: float | None


@dataclass(frozen=True)
class Figures:
    """What a rule has come to, over all answers in its folder.

    answers, errors: prompts. paired: prompts that plain sampling has answered too. left_out: prompts that were tried
    and are not paired, as they failed under this rule or are missing or failed under plain sampling.
    reward: mean. gain: mean difference from plain sampling's reward, over the paired prompts; None for plain sampling.
    against_plain: None without a judge, and for plain sampling.
    length: mean tokens of an answer. judged, sampled, rm_scored: mean tokens of a prompt, as `Counts` explains them.
    waste_per_rejection: tokens of a rejected attempt. acceptance_rate: of the attempts; None for rules without a test.
    seconds: wall time of a prompt: that of all starts, shared among the answers. tokens_per_second: tokens of answers.
    Both are None where times were not kept.
    """

    rule: str
    answers: int
    errors: int
    paired: int
    left_out: int
    reward: Estimate | None
    gain: Estimate | None
    against_plain: AgainstPlain | None
    length: float | None
    judged: float | None
    sampled: float | None
    rm_scored: float | None
    waste_per_rejection: float | None
    acceptance_rate: float | None
    seconds: float | None
    tokens_per_second: float | None


def figures_of(
    rule: str,
    answers: Answers,
    errors: int,
    base: Answers,
    outcomes: Mapping[int | str, Outcome] | None,
    *,
    is_base: bool,
    tests: bool,
) -> Figures:
    """Work out a rule's figures.

    Args:
        answers, base: its answers and plain sampling's, by prompt, in the order of the prompts.
        outcomes: of the paired prompts; None without a judge.
        is_base: whether it is plain sampling itself.
        tests: whether it accepts and rejects.
    """
    paired = [i for i in answers if i in base]
    found = list(answers.values())
    counts = {
        name: sum(answer.counts[name] for answer in found)
        for name in ("rejected", "rejections", "attempts", "accepted")
    }
    timed = [answer for answer in found if answer.cost["seconds"] is not None]
    seconds = sum(answer.cost["seconds"] for answer in timed)
    tokens = sum(len(answer.token_ids) for answer in timed)
    return Figures(
        rule=rule,
        answers=len(found),
        errors=errors,
        paired=len(paired),
        left_out=len(found) + errors - len(paired),
        reward=estimate([answer.reward for answer in found]),
        gain=None if is_base else estimate([answers[i].reward - base[i].reward for i in paired]),
        against_plain=None if is_base or outcomes is None else _against(paired, answers, base, outcomes),
        length=_mean([len(answer.token_ids) for answer in found]),
        judged=_mean([answer.counts["judged"] for answer in found]),
        sampled=_mean([answer.cost["sampled"] for answer in found]),
        rm_scored=_mean([answer.cost["rm_scored"] for answer in found]),
        waste_per_rejection=_share(counts["rejected"], counts["rejections"]),
        acceptance_rate=_share(counts["accepted"], counts["attempts"]) if tests else None,
        seconds=_share(seconds, len(timed)),
        tokens_per_second=_share(tokens, seconds),
    )


def _against(
    paired: Sequence[int | str],
    answers: Mapping[int | str, Answer],
    base: Mapping[int | str, Answer],
    outcomes: Mapping[int | str, Outcome],
) -> AgainstPlain:
    results = [outcomes[i].result for i in paired]
    judged = [i for i in paired if outcomes[i].result in HALF]
    wins = [HALF[outcomes[i].result] for i in judged]
    longer = [len(answers[i].token_ids) - len(base[i].token_ids) for i in judged]
    not_longer = [win for win, difference in zip(wins, longer, strict=True) if difference <= 0]
    flips = [flipped for i in paired if (flipped := outcomes[i].flipped) is not None]
    return AgainstPlain(
        wins=results.count("win"),
        ties=results.count("tie"),
        losses=results.count("loss"),
        unreadable=results.count("unreadable"),
        failed=results.count("error"),
        win_rate=estimate(wins),
        flip_rate=_mean(flips),
        not_longer=len(not_longer),
        win_rate_not_longer=_mean(not_longer),
        length_controlled=length_controlled(wins, longer),
    )


def _mean(values: Sequence[float]) -> float | None:
    return _share(sum(values), len(values))


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
