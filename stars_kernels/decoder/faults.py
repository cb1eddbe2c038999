"""What is wrong with the rows of a round that have no reward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stars_kernels.decoder.rules import Verdict

BAD_LOGITS = "the logits hold nan or +inf, or are all -inf, expected finite numbers"


class Fault(NamedTuple):
    """What is wrong with a row, and the exception behind it, if any. It ends the answer if the row is to be judged."""

    what: str
    cause: Exception | None


def fault_of(verdict: Verdict, best: int, judged: int, planned: int) -> Fault | None:
    """Return what is wrong with a rule's verdict on the last of `judged` attempts, of `planned` ones.

    best: the attempt chosen by the verdict before, -1 = none: only its keys and values are kept beside the new one's.
    """
    if verdict.chosen not in (judged - 1, best) or verdict.chosen < 0:
        allowed = f"{judged - 1}, the newest" + (f", or {best}, which it chose before" if best >= 0 else "")
        return Fault(f"the rule chose attempt {verdict.chosen}, expected {allowed}", None)
    if verdict.outcome is None and judged >= planned:
        return Fault(f"the rule took none of the {planned} attempts that it planned", None)
    return None


def faults_of(
    rewards: Sequence[float],
    broken: Sequence[bool],
    unsampled: Mapping[int, Exception],
    unscored: Mapping[int, Exception],
    unstopped: Mapping[int, Exception],
) -> dict[int, Fault]:
    """Return what failed first on each row that has no reward.

    Args:
        rewards, broken: per row. broken: it holds a token that could not be sampled, or its end could not be found.
        unsampled, unscored, unstopped: errors of logits processors, of the reward model, of stopping criteria.
    """
    faults = {r: Fault("the reward is nan, expected a number", None) for r, x in enumerate(rewards) if math.isnan(x)}
    faults |= {row: Fault("the reward model failed", error) for row, error in unscored.items()}
    for row in itertools.compress(range(len(broken)), broken):
        known = row in unsampled
        faults[row] = Fault("a logits processor failed", unsampled[row]) if known else Fault(BAD_LOGITS, None)
    return faults | {row: Fault("a stopping criterion failed", error) for row, error in unstopped.items()}
