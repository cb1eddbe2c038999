"""What is wrong with the rows of a round that have no reward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

BAD_LOGITS = "the logits hold nan or +inf, or are all -inf, expected finite numbers"


class Fault(NamedTuple):
    """What failed, and the exception that says so. It ends an answer once the row comes to be judged."""

    what: str
    cause: Exception | None


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
