"""The two sides of a round: a Proposer (the language model) and a Scorer (the reward model).

A round knows a request by its slot, which it is given when it is admitted, and which is another's once it has ended.
The steps of a round are propose, score, judge (by the rule) and commit; it scores and judges wave by wave, in the order
of judgement, and what lies behind an attempt that is taken is never scored. Any step may run out of memory, and the
round is then repeated. So none changes what the repeat would see: a commit shows only when the function that it returns
is called.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from stars_kernels.decoder.rules import Plan
from stars_kernels.decoder.transfer import to_device

Settle = Callable[[], None]
"""Makes a commit visible. It assigns, and copies into memory that is there, so it does not run out of memory.

Where it fails all the same, the answers in the round end, as what it wrote cannot be taken back."""


def together(settles: Sequence[Settle]) -> Settle:
    """Return one function that makes several commits visible, in their order."""

    def settle() -> None:
        for part in settles:
            part()

    return settle


@dataclass(frozen=True)
class Room:
    """What requests may need at once.

    slots: requests side by side. tokens: of all their prompts and answers. answer: tokens of the longest answer.
    segment: tokens that a row may grow by.
    """

    slots: int
    tokens: int
    answer: int
    segment: int


@dataclass(frozen=True)
class Admission:
    """A request that gets a slot.

    place: where the tokens of its prompt and answer lie, among those of all slots. prompt: token ids, one at least.
    request: what a proposer and a scorer know of it besides; the decoder knows nothing of that. source: where the same
    tokens lie already as the first `shared` of the prompt, in the proposer's and in a scorer's memory of the same ids:
    who can copies what it has of them, instead of reading them again.
    """

    slot: int
    place: int
    prompt: Sequence[int]
    request: Any = None
    source: int = 0
    shared: int = 0


def admissions(prompts: Sequence[Sequence[int]], answer: int, requests: Sequence[Any] = ()) -> list[Admission]:
    """Give each prompt the slot of its index, and behind the others' a place for it and `answer` tokens more."""
    places = itertools.accumulate((len(prompt) + answer for prompt in prompts), initial=0)
    known = requests or [None] * len(prompts)
    return [
        Admission(slot, place, prompt, request)
        for slot, (place, prompt, request) in enumerate(zip(places, prompts, known, strict=False))
    ]


@dataclass(frozen=True)
class Rows:
    """The rows of a round, grouped by slot; every tensor is [R] int64."""

    slots: Sequence[int]
    """`slot` on the host, where nothing has to wait for it."""

    slot: Tensor
    attempt: Tensor
    """What the row's random numbers are made from: its attempt, but see `Answer.number`."""
    key: Tensor
    position: Tensor
    """Of the row's next token in the answer: behind the decided ones, and those that it holds."""

    attempts: Sequence[int] = ()
    """`attempt` on the host."""
    held: Sequence[Sequence[int]] = ()
    """In a race, the tokens that each row holds already, as many in all; () = none."""

    def __len__(self) -> int:
        return self.slot.shape[0]

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.slot, self.attempt, self.key, self.position

    def held_tokens(self) -> Tensor:
        """Return `held` on the rows' device, [R, H] int64."""
        if not self.held:
            return self.slot.new_empty(len(self), 0)
        (flat,) = to_device([[token for tokens in self.held for token in tokens]], self.slot.device)
        return flat.view(len(self), -1)

    def map(self, change: Callable[[Tensor], Tensor], slots: Sequence[int]) -> Rows:
        """Return rows of these slots, with every tensor changed."""
        slot, attempt, key, position = map(change, self.columns)
        return Rows(slots, slot, attempt, key, position)


@dataclass(frozen=True)
class Commit:
    """What a round decided, for each of its slots; every tensor is [C]."""

    host: Sequence[tuple[int, int, int, bool]]
    """(slot, row, length, advance) of each, on the host."""

    slot: Tensor
    row: Tensor
    """The row whose suffix is written behind the prefix: taken, or the best so far; -1 = none."""
    length: Tensor
    """Tokens of the segment that is written or, where row is -1, that already lies behind the prefix."""
    advance: Tensor
    """bool: the segment becomes a part of the prefix."""
    last_token: Tensor
    """The segment's last token."""


@dataclass
class Proposal:
    """Candidates of a round's rows.

    tokens: [R, <= size] int64, -1 where a row's logits were not usable. errors: why, where it was not for the logits.
    logprobs: of the tokens, float, as in `Candidate.logprob`. entropies: [R, <= size] float64, in nats, of the
    softmax(logits) that each token is from, NaN at the first; None where the plan has no bound.
    """

    tokens: Tensor
    logprobs: Tensor
    entropies: Tensor | None = None
    errors: dict[int, Exception] = field(default_factory=dict)

    def logprob(self, lengths: Tensor) -> Tensor:
        """Sum the log-probabilities of the first lengths[r] tokens of each row, [R] float64.

        In order, so that a sum does not depend on what lies behind the candidate's end.
        """
        return self.logprobs.cumsum(dim=1, dtype=torch.float64).gather(1, lengths[:, None] - 1)[:, 0]


@dataclass
class Scores:
    """Rewards [R] float64 of a wave, or [A] of the empty answers of admitted requests."""

    rewards: Tensor
    tokens: Tensor | None = None
    """[R] tokens the reward model read for each; None where nothing is read (a function, a head on hidden states)."""
    errors: dict[int, Exception] = field(default_factory=dict)
    """By row of the wave, or by admitted request: those that the scorer failed on; their rewards are NaN."""

    @property
    def read(self) -> Tensor:
        """`tokens`, 0 where there are none."""
        return torch.zeros_like(self.rewards, dtype=torch.int64) if self.tokens is None else self.tokens


class Proposer(Protocol):
    """Samples candidate segments from one shared prefix per slot."""

    device: torch.device

    def reserve(self, room: Room) -> None:
        """Take the memory for requests; those that had slots are forgotten.

        Where it is the memory of before, the tokens at their places stay: an admission may name them as its source.
        """

    def admit(self, admissions: Sequence[Admission]) -> Sequence[int]:
        """Read the prompts of requests that get free slots; return how many tokens of each that took.

        Where it fails, the other slots are as they were.
        """

    def propose(
        self, rows: Rows, plan: Plan, sampling: dict[str, Any], noise: int, eos: Tensor, check_stop: Callable[[], None]
    ) -> Proposal:
        """Draw up to plan.size tokens for every row as the plan has it, from the noise stream `noise`.

        It may go on past a row's end, and may stop early once every row has ended. May be asked again before a commit,
        for other rows.

        Args:
            plan: what the plans of the rows' slots have in common; size, attempts: the most of any.
            check_stop: asked before each token is enqueued; raises where nobody wants the rows any more.
        """

    def commit(self, commit: Commit) -> Settle:
        """Write what is kept of the last round's rows behind the prefixes; it shows once the result is called."""

    def release(self) -> None:
        """Give back the memory of the last round's rows: the round failed, and one of fewer rows follows."""

    def close(self) -> None:
        """Give back all memory, also where `reserve` or `admit` failed; only `reserve` may follow."""


class Scorer(Protocol):
    """Scores candidates behind the decided answer."""

    def reserve(self, room: Room) -> None:
        """Take the memory for requests; those that had slots are forgotten.

        Where it is the memory of before, the tokens at their places stay: an admission may name them as its source.
        """

    def admit(self, admissions: Sequence[Admission]) -> Scores:
        """Read the prompts as the proposer's `admit` does; return r(x), the rewards of the empty answers."""

    def open(self, rows: Rows, tokens: Tensor, lengths: Tensor) -> None:
        """Take a round's candidates, tokens[r, :lengths[r]] behind the decided answer; may be asked again."""

    def score(self, wave: Sequence[int]) -> Scores:
        """Return the rewards [len(wave)] of prompt + decided answer + candidate, of these of the opened rows.

        wave: in rising order; each row is in one wave of a round, at most.
        """

    def commit(self, commit: Commit) -> Settle:
        """Write what is kept of the last round's rows behind the prefixes; it shows once the result is called."""

    def release(self) -> None:
        """Give back the memory of the last round's rows: the round failed, and one of fewer rows follows."""

    def close(self) -> None:
        """Give back all memory, also where `reserve` or `admit` failed; only `reserve` may follow."""


class QueueingProposer(Proposer, Protocol):
    """A proposer whose rounds a device can judge by itself: none of their steps waits for it."""

    unread: frozenset[int]
    """The slots whose last decided token it has not read yet. Who keeps account of them elsewhere takes them out."""

    @property
    def reads_late(self) -> bool:
        """Whether a segment's last token is read after it is decided, by `read_last`; else it was read before."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All that a commit reads and writes, besides its own arguments."""

    def read_last(self, slots: Sequence[int], slot: Tensor, unread: Tensor) -> None:
        """Read the last decided token of those of these slots [C] that `unread` [C] (bool) says, none of `self.unread`.

        slot: the same on the device.
        """


class QueueingScorer(Scorer, Protocol):
    """A scorer whose rounds a device can judge by itself: it only queues its work, and fails on no row alone."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All that a commit reads and writes, besides its own arguments."""
