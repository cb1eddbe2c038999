"""What is wrong with the rows of a round that have no reward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stars_kernels.decoder.rules import Candidate, Plan, Verdict

BAD_LOGITS = "the logits hold nan or +inf, or are all -inf, expected finite numbers"


class Fault(NamedTuple):
    """What is wrong with a row, and the exception behind it, if any. It ends the answer if the row is to be judged."""

    what: str
    cause: Exception | None


def fault_of(verdict: Verdict, best: int, candidates: Sequence[Candidate], plan: Plan) -> Fault | None:
    """Return what is wrong with a rule's verdict on the last of `candidates`.

    best: the attempt chosen by the verdict before, -1 = none: only its keys and values are kept beside the new one's.
    """
    judged, planned = len(candidates), plan.attempts
    if verdict.keep is not None and (verdict.outcome is not None or not plan.race or judged < planned):
        return Fault(f"the rule kept {verdict.keep}, expected no keep but of a race, after a turn's last attempt", None)
    if plan.race:
        return _fault_of_race(verdict, candidates, planned)
    if verdict.chosen not in (judged - 1, best) or verdict.chosen < 0:
        allowed = f"{judged - 1}, the newest" + (f", or {best}, which it chose before" if best >= 0 else "")
        return Fault(f"the rule chose attempt {verdict.chosen}, expected {allowed}", None)
    if verdict.outcome is None and judged >= planned:
        return Fault(f"the rule took none of the {planned} attempts that it planned", None)
    return None


def _fault_of_race(verdict: Verdict, candidates: Sequence[Candidate], planned: int) -> Fault | None:
    """Return what is wrong with a verdict in a race, where nothing is kept but the attempts that go on."""
    if verdict.outcome is not None:
        known = 0 <= verdict.chosen < len(candidates)
        if known and candidates[verdict.chosen].ended:
            return None
        return Fault(f"the rule took attempt {verdict.chosen} of a race, expected one that has ended", None)
    if len(candidates) < planned:
        return None
    keep = verdict.keep or ()
    if not (all(i in range(len(candidates)) for i in keep) and list(keep) == sorted(set(keep))):
        return Fault(f"the rule kept {keep} of {len(candidates)} attempts, expected indices in rising order", None)
    if all(candidates[i].ended for i in keep):
        return Fault(f"the rule kept {keep} and took none, expected one at least that has not ended", None)
    return None


def faults_of_sampling(
    broken: Sequence[bool], unsampled: Mapping[int, Exception], unstopped: Mapping[int, Exception]
) -> dict[int, Fault]:
    """Return what failed on each row before it could have a reward.

    Args:
        broken: per row; it holds a token that could not be sampled, or its end could not be found.
        unsampled, unstopped: errors of logits processors, of stopping criteria.
    """
    faults: dict[int, Fault] = {}
    for row in itertools.compress(range(len(broken)), broken):
        known = row in unsampled
        faults[row] = Fault("a logits processor failed", unsampled[row]) if known else Fault(BAD_LOGITS, None)
    return faults | {row: Fault("a stopping criterion failed", error) for row, error in unstopped.items()}


def fault_of_score(reward: float, error: Exception | None) -> Fault | None:
    """Return what is wrong with a row's reward. error: the reward model's, if it failed on the row."""
    if error is not None:
        return Fault("the reward model failed", error)
    return Fault("the reward is nan, expected a number", None) if math.isnan(reward) else None
