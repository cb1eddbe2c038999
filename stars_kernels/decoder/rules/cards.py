"""CARDS (arXiv 2406.16306): STARS' acceptance, on segments that end where the model is unsure how to go on."""

from __future__ import annotations

from dataclasses import dataclass

from stars_kernels.decoder.checks import check_number
from stars_kernels.decoder.rules.rule import AnswerSoFar, Plan
from stars_kernels.decoder.rules.stars import Stars


@dataclass(frozen=True)
class Cards(Stars):
    """Take the first attempt that is accepted, after max_attempts the best; an attempt ends before an unsure token.

    That is the first token, after the attempt's own first one, whose next-token entropy is `entropy_threshold` or more:
    in nats, of softmax(logits) at temperature 1 and unfiltered, though after any logits processors. `segment_size` is
    the most tokens that an attempt has.

    As in the paper and its code: where segments end; the threshold, which rises from r0 = (1 - alpha) r(x) + alpha r*
    to r* with the answer's length; accepting with probability min(1, exp((r - tau) / beta)), or iff r >= tau; the
    defaults, 3.0 nats and 64 tokens among them. Otherwise than in the code: a segment may have one token (there, four
    at least); the last of max_attempts is tested as those before it are, and its rejection leaves the best of all
    (there, one attempt more is drawn and not tested); beta is not the sampling temperature too, and like r* it is
    calibrated where it is not given.
    """

    segment_size: int = 64
    entropy_threshold: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "entropy_threshold", lambda x: x > 0, "a finite number > 0, in nats")

    def plan(self, answer: AnswerSoFar) -> Plan:
        return super().plan(answer)._replace(entropy=self.entropy_threshold)
