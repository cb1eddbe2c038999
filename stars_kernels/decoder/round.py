"""One round of decoding, for a batch of answers in lock-step: propose, score, judge, commit.

A round tries some attempts at each slot's segment side by side and judges them in the order in which
`decoder/sequential.py` would have tried them, so an answer never depends on how many there are, nor on other slots.
What may go wrong with a row is in `decoder/faults.py`, running out of memory in `decoder/scheduler.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.ends import Ends, find_ends
from stars_kernels.decoder.faults import Fault, faults_of
from stars_kernels.decoder.protocols import Commit, Proposal, Proposer, Rows, Scorer, Scores, Settle, together
from stars_kernels.decoder.rules import Candidate, Rule, Verdict
from stars_kernels.decoder.transfer import to_device, to_host
from stars_kernels.ops.philox import STREAM_SAMPLE, accept_uniform


@dataclass
class Trial:
    """What a round tried for one slot, and what came of it.

    head: its first row. candidates: of its rows; judged: how many of them were judged. verdict: of the last one judged;
    None where the first failed. fault: of the candidate behind the judged ones, which ends the answer. sampled: tokens
    in its rows, those past a candidate's end included. rm_scored: tokens that the reward model read.
    """

    slot: int
    head: int
    candidates: list[Candidate]
    sampled: int
    rm_scored: int
    judged: int = 0
    verdict: Verdict | None = None
    fault: Fault | None = None


@dataclass
class Round:
    """Plays rounds with the models and answers of one batch; an answer's slot is its index."""

    proposer: Proposer
    scorer: Scorer
    rule: Rule
    sampling: dict[str, Any]
    """The keyword arguments of `ops.segment_sample`."""
    answers: list[Answer]
    eos: tuple[int, ...] = ()
    noise: int = STREAM_SAMPLE
    """The noise stream that attempts draw from."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the host, by phase."""

    def begin(self) -> None:
        """Read the prompts. Where it raises, nothing is done, and less of a batch may fit."""
        prompts = [answer.prompt for answer in self.answers]
        limit = max((answer.limit for answer in self.answers), default=0)
        size = max((answer.size(self.rule.plan(answer)) for answer in self.answers), default=0)
        with self.timed("prefill"):
            (self._eos,) = to_device([self.eos], self.proposer.device)
            self.proposer.begin(prompts, limit, size)
            scores = self.scorer.begin(prompts, limit, size)
            rewards, read = to_host((scores.rewards, scores.read))
        for slot, answer in enumerate(self.answers):
            answer.reward = answer.prompt_reward = rewards[slot]
            answer.counts.rm_scored += read[slot]
            if slot in scores.errors:
                answer.fail("the reward model failed on the empty answer", scores.errors[slot])
            elif not math.isfinite(rewards[slot]):
                answer.fail(f"the reward of the empty answer is {rewards[slot]}, expected a finite number")

    def play(self, slots: Sequence[int], widths: Sequence[int]) -> tuple[list[Trial], Settle]:
        """Try widths[i] attempts for slots[i]. Nothing that a repeat would see changes before the result is settled.

        On a GPU the host issues all of it ahead and waits once, for what `judge` reads. What it has to see before (stop
        strings, logits processors, rewards of texts) it waits for there.
        """
        rows = self.rows(slots, widths)
        proposal, ends = self.propose(rows, slots)
        scores = self.score(rows, proposal, ends)
        trials = self.judge(rows, slots, widths, proposal, ends, scores)
        return trials, self.commit(trials)

    def rows(self, slots: Sequence[int], widths: Sequence[int]) -> Rows:
        """One row per attempt, grouped by slot: the next attempts at each one's segment."""
        of_rows = [slot for slot, width in zip(slots, widths, strict=True) for _ in range(width)]
        attempts = [
            len(self.answers[slot].candidates) + i for slot, n in zip(slots, widths, strict=True) for i in range(n)
        ]
        keys, positions = [self.answers[s].key for s in of_rows], [len(self.answers[s].tokens) for s in of_rows]
        return Rows(of_rows, *to_device((of_rows, attempts, keys, positions), self.proposer.device))

    def propose(self, rows: Rows, slots: Sequence[int]) -> tuple[Proposal, Ends]:
        """Sample a candidate for every row, from one shared prefix per slot, and find where it ends."""
        plans = {slot: self.rule.plan(self.answers[slot]) for slot in slots}
        sizes = [self.answers[slot].size(plans[slot]) for slot in rows.slots]
        with self.timed("propose"):
            proposal = self.proposer.propose(rows, max(sizes), self.sampling, self.noise, self._eos)
        with self.timed("judge"):
            (room,) = to_device([sizes], self.proposer.device)
            return proposal, find_ends(self.answers, rows, proposal.tokens, room, self._eos)

    def score(self, rows: Rows, proposal: Proposal, ends: Ends) -> Scores:
        """Score every candidate behind its slot's answer."""
        with self.timed("score"):
            return self.scorer.score(rows, proposal.tokens.clamp(min=0), ends.lengths)

    def judge(
        self, rows: Rows, slots: Sequence[int], widths: Sequence[int], proposal: Proposal, ends: Ends, scores: Scores
    ) -> list[Trial]:
        """Let the rule judge each slot's candidates in order, until one is taken or one that failed is reached."""
        with self.timed("judge"):
            uniforms = accept_uniform(rows.key, rows.position, rows.attempt)  # [R]
            columns = (scores.rewards, uniforms, proposal.tokens, ends.lengths, ends.stopped, ends.broken, scores.read)
            rewards, uniform, tokens, lengths, stopped, broken, read = to_host(columns)
            faults = faults_of(rewards, broken, proposal.errors, scores.errors, ends.errors)
            trials, head = [], 0
            for slot, width in zip(slots, widths, strict=True):
                mine = range(head, head + width)
                tried = [Candidate(tokens[r][: lengths[r]], rewards[r], uniform[r], stopped[r]) for r in mine]
                sampled, scored = sum(len(tokens[r]) for r in mine), sum(read[r] for r in mine)
                trials.append(Trial(slot, head, tried, sampled, scored))
                self._judge(trials[-1], {r - head: faults[r] for r in mine if r in faults})
                head += width
            return trials

    def _judge(self, trial: Trial, faults: dict[int, Fault]) -> None:
        answer = self.answers[trial.slot]
        candidates = list(answer.candidates)
        for column, candidate in enumerate(trial.candidates):
            if column in faults:
                trial.fault = faults[column]
                return
            candidates.append(candidate)
            trial.judged, trial.verdict = column + 1, self.rule.judge(answer, candidates)
            if trial.verdict.outcome is not None:
                return

    def commit(self, trials: Sequence[Trial]) -> Settle:
        """Write each slot's chosen candidate behind its prefix, of which it becomes a part where it is taken.

        Where the rule wants more attempts, the best so far is written all the same: were it taken in the end, nothing
        would be computed again.
        """
        host, last = [], []
        for trial in trials:
            answer, verdict = self.answers[trial.slot], trial.verdict
            if trial.fault is not None or verdict is None:
                continue
            column = verdict.chosen - len(answer.candidates)  # < 0: of an earlier round, and written then
            if column < 0 and verdict.outcome is None:
                continue
            chosen = trial.candidates[column] if column >= 0 else answer.candidates[verdict.chosen]
            row = trial.head + column if column >= 0 else -1
            host.append((trial.slot, row, len(chosen.tokens), verdict.outcome is not None))
            last.append(chosen.tokens[-1])
        if not host:
            return together([])
        with self.timed("commit"):
            columns = to_device([*zip(*host, strict=True), last], self.proposer.device)
            slots, rows, lengths, advance, last_tokens = columns
            commit = Commit(host, slots, rows, lengths, advance.bool(), last_tokens)
            return together([self.proposer.commit(commit), self.scorer.commit(commit)])

    def book(self, trial: Trial) -> None:
        """Write what a settled round tried for one slot on its answer."""
        answer = self.answers[trial.slot]
        answer.counts.sampled += trial.sampled
        answer.counts.rm_scored += trial.rm_scored
        if trial.fault is not None:
            answer.fail(f"attempt {len(answer.candidates) + trial.judged}: {trial.fault.what}", trial.fault.cause)
            return
        assert trial.verdict is not None
        answer.add(trial.candidates[: trial.judged], trial.verdict, len(trial.candidates))
        if trial.verdict.outcome is not None:
            answer.take(trial.verdict, self.eos)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
