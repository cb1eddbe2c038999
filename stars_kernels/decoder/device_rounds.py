"""Rounds of STARS that the device judges by itself: the host hears of one while the next one runs.

What a round needs to know of an answer (its length, the attempts so far, the best of them) lies on the device, one
number a slot, and a round leaves there what the next one begins with. So the host queues round n + 1 before it knows
what round n has taken, and books n while n + 1 runs. A slot whose answer ends in round n is masked in n + 1: nothing is
taken there, and the host, which hears of the end meanwhile, leaves the slot out of n + 2.

`decoder/round.py` plays the same rounds with a host that judges; a run may go over from the one to the other between
any two rounds. The definition of both is `decoder/sequential.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from stars_kernels import ops
from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.ends import Ends, find_ends, is_in
from stars_kernels.decoder.faults import fault_of_score, faults_of_sampling
from stars_kernels.decoder.protocols import (
    Commit,
    Proposal,
    QueueingProposer,
    QueueingScorer,
    Rows,
    Scores,
    Settle,
    together,
)
from stars_kernels.decoder.round import Round
from stars_kernels.decoder.rules import Candidate, Plan, Stars, Verdict, best
from stars_kernels.decoder.transfer import Reading, to_device
from stars_kernels.decoder.trial import Trial, grown
from stars_kernels.ops.accept import ACCEPTED, FALLBACK, NAN


class Place(Protocol):
    """Memory that stays where it is, and work on it that may be captured once and replayed."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of this shape, the same as before where it has been asked for; it holds anything."""

    def run(self, key: Hashable, work: Callable[[], None], tensors: Sequence[Tensor]) -> None:
        """Do the work; key: all that it is a function of, but for these tensors, which are all that it works on."""


NUMBERS = (
    "key",
    "position",  # decided tokens
    "attempt",  # attempts at the segment, so far
    "best_attempt",  # -1 = none
    "best_length",
    "best_last",  # its last token
    "limit",
    "budget",
    "active",  # 0 = nothing is taken
    "unread",  # whether the last decided token is not in the cache yet
)
"""What is known of a slot, int64. The names are those of `Answer`, but for the best attempt so far."""
REWARDS = ("prompt_reward", "best_reward")
"""The same, float64."""


class Known:
    """What the device knows of its slots: a column [P] for each of NUMBERS and REWARDS."""

    def __init__(self, numbers: Tensor, rewards: Tensor) -> None:
        """numbers: [len(NUMBERS), P] int64; rewards: [len(REWARDS), P] float64."""
        self.tensors, self.slots = (numbers, rewards), numbers.shape[1]

    def of(self, slot: Tensor) -> dict[str, Tensor]:
        """Return what is known of these slots [C], a copy [C] of each column."""
        numbers, rewards = (tensor[:, slot] for tensor in self.tensors)
        return dict(zip((*NUMBERS, *REWARDS), (*numbers, *rewards), strict=True))

    def write(self, slot: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Know this of these slots [C], of which none comes twice."""
        for tensor, names in zip(self.tensors, (NUMBERS, REWARDS), strict=True):
            tensor[:, slot] = torch.stack([columns[name] for name in names])


def known_of(answer: Answer, unread: bool) -> tuple[list[int], list[float]]:
    """Tell what the device is to know of an answer, in the order of NUMBERS and REWARDS."""
    so_far = answer.candidates[answer.chosen] if answer.candidates else None
    best_numbers = (-1, 1, 0) if so_far is None else (so_far.attempt, len(so_far.tokens), so_far.tokens[-1])
    numbers = [answer.key, len(answer.tokens), len(answer.candidates), *best_numbers]
    numbers += [answer.limit, answer.max_new_tokens, 1, int(unread)]
    return numbers, [answer.prompt_reward, 0.0 if so_far is None else so_far.reward]


@dataclass
class InFlight:
    """A round that was queued, and that the host has not heard of.

    answers: by slot, in the order of its rows, `width` each. told: its record, on the way to the host. followed: the
    slots whose last token a later round has read.
    """

    answers: dict[int, Answer]
    width: int
    size: int
    told: Reading
    followed: set[int] = field(default_factory=set)


class DeviceRounds:
    """Queues rounds of `round`'s two models, and books them a round late.

    Only for `Stars` itself, and for answers without stops.
    """

    def __init__(
        self, round: Round, rule: Stars, proposer: QueueingProposer, scorer: QueueingScorer, place: Place
    ) -> None:
        """rule, proposer, scorer: those of `round`."""
        self.round, self.rule, self.proposer, self.scorer, self.place = round, rule, proposer, scorer, place
        self.in_flight: InFlight | None = None
        self.known: Known | None = None

    def may_end(self, slot: int, answer: Answer) -> bool:
        """Say whether the round in flight fills an answer's room if it takes an attempt: the next would be for nothing.

        An answer that ends otherwise, with an end of sequence, is found out a round late.
        """
        flying = self.in_flight
        return flying is not None and flying.answers.get(slot) is answer and answer.room <= flying.size

    def prepare(self, answers: Mapping[int, Answer], slots: int, width: int) -> Settle:
        """Queue `width` candidates for each of these answers, by slot, and their rewards, without waiting.

        slots: in all. Returns what queues their judgement, once the round in flight, if one is, has been collected. So
        far nothing is decided: where this raises, it may be asked again. What the result writes cannot be taken back.
        """
        size = min(self.rule.segment_size, max(answer.room for answer in answers.values()))
        with self.round.timed("propose"):
            known = self._take_over(answers, slots)
            (slot,) = to_device([list(answers)], self.proposer.device)  # [C]
            now = known.of(slot)
            if self.proposer.reads_late:
                self.proposer.read_last(list(answers), slot, now["unread"].bool())
                self.proposer.unread = self.proposer.unread.difference(answers)
                if self.in_flight is not None:
                    self.in_flight.followed.update(answers)
                known.write(slot, {**now, "unread": torch.zeros_like(slot)})
            rows = self._rows(list(answers), slot, now, width)
        proposal, ends, scores = self._candidates(rows, now, size, width)
        judgement = self._judgement(known, slot, proposal, ends, scores, width)

        def queue() -> None:
            with self.round.timed("judge"):
                self.in_flight = InFlight(dict(answers), width, size, judgement())

        return queue

    def collect(self) -> list[Trial]:
        """Hear, perhaps after a wait, what the round in flight has come to; the answers are as before it.

        Returns a trial for each answer that is still active.
        """
        flying, self.in_flight = self.in_flight, None
        assert flying is not None
        with self.round.timed("judge"):
            columns = flying.told.wait()
            if self.proposer.reads_late:
                taken = zip(flying.answers, columns["outcome"], strict=True)
                unread = {slot for slot, outcome in taken if outcome in (ACCEPTED, FALLBACK)}
                self.proposer.unread |= unread - flying.followed
            return [
                self._trial(slot, answer, index, flying.width, columns)
                for index, (slot, answer) in enumerate(flying.answers.items())
                if answer.active and self.round.answers.get(slot) is answer
            ]

    def forget(self) -> None:
        """Forget what is in flight, and what the device knows: nobody waits for it."""
        self.in_flight = self.known = None

    def _take_over(self, answers: Mapping[int, Answer], slots: int) -> Known:
        """Tell the device of the answers that the round in flight is not for: of the others it knows more than we."""
        if self.known is None:
            numbers = self.place.take("numbers", (len(NUMBERS), slots), torch.int64)
            self.known = Known(numbers, self.place.take("rewards", (len(REWARDS), slots), torch.float64))
        flying = {} if self.in_flight is None else self.in_flight.answers
        fresh = {slot: answer for slot, answer in answers.items() if flying.get(slot) is not answer}
        if fresh:
            proposer = self.proposer
            told = [known_of(answer, slot in proposer.unread) for slot, answer in fresh.items()]
            columns = zip(*((slot, *integers) for slot, (integers, _) in zip(fresh, told, strict=True)), strict=True)
            slot, *integers = to_device(list(columns), proposer.device)
            floats = to_device(list(zip(*(floats for _, floats in told), strict=True)), proposer.device, torch.float64)
            names = (*NUMBERS, *REWARDS)
            self.known.write(slot, dict(zip(names, (*integers, *floats), strict=True)))
        return self.known

    def _rows(self, slots: Sequence[int], slot: Tensor, now: Mapping[str, Tensor], width: int) -> Rows:
        """Make `width` rows for each slot [C], those behind the last attempt copies of its."""
        attempt = now["attempt"][:, None] + torch.arange(width, device=slot.device)  # [C, W]
        attempt = attempt.clamp(max=self.rule.max_attempts - 1).flatten()
        slot, key, position = (part.repeat_interleave(width) for part in (slot, now["key"], now["position"]))
        return Rows([p for p in slots for _ in range(width)], slot, attempt, key, position)

    def _candidates(
        self, rows: Rows, now: Mapping[str, Tensor], size: int, width: int
    ) -> tuple[Proposal, Ends, Scores]:
        """Queue the candidates and their rewards."""
        round_ = self.round
        with round_.timed("propose"):
            plan = Plan(size, self.rule.max_attempts, early=True)
            given = plan, round_.sampling, round_.noise, round_.eos_tensor, round_.check_stop
            proposal = self.proposer.propose(rows, *given)
        with round_.timed("judge"):
            room = (now["limit"] - now["position"]).clamp(1, size).repeat_interleave(width)
            ends = find_ends({}, Rows((), *rows.columns), proposal, room, round_.eos_tensor)
        round_.open(rows, proposal, ends)
        return proposal, ends, round_.score(range(len(rows)))

    def _judgement(
        self, known: Known, slot: Tensor, proposal: Proposal, ends: Ends, scores: Scores, width: int
    ) -> Callable[[], Reading]:
        """Return what queues the judgement, and what follows from it, and returns the round's record."""
        count, eos, tokens = len(slot), self.round.eos_tensor, proposal.tokens  # [R, T]

        def kept(name: str, value: Tensor) -> Tensor:
            return self.place.take(name, tuple(value.shape), value.dtype).copy_(value)

        index, eos, lengths = kept("slot", slot), kept("eos", eos), kept("lengths", ends.lengths)
        rewards = kept("row rewards", scores.rewards.masked_fill(ends.broken, math.nan))
        thresholds = self.place.take("thresholds", tuple(rewards.shape), torch.float64)
        outcome, chosen = (self.place.take(name, (count,), torch.int64) for name in ("outcome", "chosen"))
        grid = (count, width)
        given = index, tokens, lengths.view(grid), rewards.view(grid), eos
        told = outcome, chosen, thresholds.view(grid)
        works_on = [*known.tensors, index, tokens, lengths, rewards, eos, outcome, chosen, thresholds]
        works_on += [*self.proposer.tensors, *self.scorer.tensors]
        record = dict(
            rewards=rewards, read=scores.read, tokens=tokens, lengths=lengths, broken=ends.broken,
            logprobs=proposal.logprob(lengths), outcome=outcome, chosen=chosen, thresholds=thresholds,
        )  # fmt: skip

        def queue() -> Reading:
            key = (*grid, tokens.shape[1], len(eos), known.slots, self.rule)
            self.place.run(key, lambda: self._judge(known, *given, *told), works_on)
            return Reading(record)

        return queue

    def _judge(
        self, known: Known, slot: Tensor, tokens: Tensor, lengths: Tensor, rewards: Tensor, eos: Tensor,
        outcome: Tensor, chosen: Tensor, thresholds: Tensor,
    ) -> None:  # fmt: skip
        """Judge, commit, and write what the next round begins with: of tensors alone, and nothing waits.

        slot: [C]. tokens: [C * W, T]. lengths, rewards: [C, W]. eos: [E]. Written: outcome, chosen [C], as of
        `ops.accept`; thresholds [C, W].
        """
        now, rule, (slots, width) = known.of(slot), self.rule, lengths.shape
        active, attempt, position = now["active"].bool(), now["attempt"], now["position"]
        columns = torch.arange(width, device=slot.device)
        valid = active[:, None] & (attempt[:, None] + columns < rule.max_attempts)
        thresholds.copy_(threshold(rule, now["prompt_reward"][:, None], position[:, None] + lengths, now["budget"]))
        best_reward, best_attempt = now["best_reward"].clone(), now["best_attempt"].clone()
        judged = ops.accept(
            rewards, valid, thresholds, now["key"], position, attempt, best_reward, best_attempt,
            max_attempts=rule.max_attempts, beta=1.0 if rule.beta is None else rule.beta, hard=rule.accept == "hard",
        )  # fmt: skip
        chosen.copy_(judged[0])
        outcome.copy_(judged[1])

        taken = (outcome == ACCEPTED) | (outcome == FALLBACK)
        here = (chosen >= 0) & (outcome != NAN)  # of this round's rows; else the best is an earlier round's, if any
        row = torch.arange(slots, device=slot.device) * width + chosen.clamp(min=0)
        length = lengths.flatten()[row].where(here, now["best_length"])
        last = tokens[row, length - 1].where(here, now["best_last"])
        ended = is_in(last, eos) | (position + length >= now["limit"])
        row, count = row.masked_fill(~here, -1), length.masked_fill(~(here | taken), 1)
        commit = Commit((), slot, row, count, taken, last)
        together([self.proposer.commit(commit), self.scorer.commit(commit)])()

        after = dict(
            key=now["key"],
            position=position + length * taken,
            attempt=(attempt + width * active).masked_fill(taken, 0),
            best_attempt=best_attempt.masked_fill(taken, -1),
            best_length=length,
            best_last=last,
            limit=now["limit"],
            budget=now["budget"],
            active=(active & (outcome != NAN) & ~(taken & ended)).long(),
            unread=(taken & ~ended).long(),
            prompt_reward=now["prompt_reward"],
            best_reward=best_reward,
        )
        known.write(slot, after)

    def _trial(self, slot: int, answer: Answer, index: int, width: int, columns: Mapping[str, list[Any]]) -> Trial:
        """Make what a round tried for a slot, and how the device judged it; index: which of the round's slots it is."""
        head = index * width
        count = min(width, answer.left(self.rule.plan(answer)))
        rows = range(head, head + count)
        starts = answer.starts(count)
        candidates = [
            grown(start, columns["tokens"][r][: columns["lengths"][r]], columns["logprobs"][r], math.nan, False,
                  answer.room, self.round.eos)
            for start, r in zip(starts, rows, strict=True)
        ]  # fmt: skip
        for candidate, r in zip(candidates, rows, strict=True):
            candidate.reward = columns["rewards"][r]
        outcome, chosen = columns["outcome"][index], columns["chosen"][index]
        trial = Trial(slot, head, candidates, width * len(columns["tokens"][head]), {}, scored=count)
        trial.rm_scored = sum(columns["read"][head : head + width])
        judged = chosen + (outcome == ACCEPTED) if outcome in (ACCEPTED, NAN) else count
        trial.verdicts = verdicts_of(answer, candidates[:judged], columns["thresholds"][head:], outcome)
        if outcome == NAN:
            broken = faults_of_sampling(columns["broken"][head : head + count], {}, {})
            trial.fault = broken.get(chosen) or fault_of_score(math.nan, None)
        return trial


def threshold(rule: Stars, prompt_reward: Tensor, tokens: Tensor, budget: Tensor) -> Tensor:
    """Return `Stars.threshold` [C, W] to the bit; prompt_reward: [C, 1]. tokens: [C, W]. budget: [C]."""
    target = rule.reward_threshold
    assert target is not None, "r* is calibrated before anything is judged"
    start = (1 - rule.alpha) * prompt_reward + rule.alpha * target
    return (start + tokens * (target - start) / budget[:, None]).clamp(max=target)


def verdicts_of(
    answer: Answer, candidates: Sequence[Candidate], thresholds: Sequence[float], outcome: int
) -> list[Verdict]:
    """Return the rule's verdicts on a round's judged candidates, the last with the outcome that the device found."""
    so_far, verdicts = list(answer.candidates), list[Verdict]()
    for candidate, tau in zip(candidates, thresholds, strict=False):
        so_far.append(candidate)
        verdicts.append(Verdict(best(so_far), None, tau))
    if outcome == ACCEPTED:
        verdicts[-1] = Verdict(len(so_far) - 1, "accepted", verdicts[-1].threshold)
    elif outcome == FALLBACK:
        verdicts[-1] = verdicts[-1]._replace(outcome="fallback")
    return verdicts
