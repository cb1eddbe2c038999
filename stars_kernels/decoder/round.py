"""One round of decoding, for several answers in lock-step: propose, score, judge, commit.

A round tries some attempts at each slot's segment side by side and judges them in the order in which
`decoder/sequential.py` would have tried them, so an answer never depends on how many there are, nor on other slots.
What may go wrong with a row is in `faults.py`, running out of memory in `scheduler.py`.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.ends import Ends, find_ends
from stars_kernels.decoder.errors import Abandoned
from stars_kernels.decoder.faults import faults_of_sampling
from stars_kernels.decoder.output import FinishReason
from stars_kernels.decoder.protocols import Commit, Proposal, Proposer, Rows, Scorer, Scores, Settle, together
from stars_kernels.decoder.rules import Candidate, Rule
from stars_kernels.decoder.transfer import to_device, to_host
from stars_kernels.decoder.trial import Trial, grown
from stars_kernels.ops.philox import STREAM_SAMPLE, accept_uniforms


@dataclass
class Round:
    """Plays rounds with two models, for the answers that have a slot."""

    proposer: Proposer
    scorer: Scorer
    rule: Rule
    sampling: dict[str, Any]
    """The keyword arguments of `ops.segment_sample`."""
    eos: tuple[int, ...] = ()
    noise: int = STREAM_SAMPLE
    """The noise stream that attempts draw from."""
    stop: Callable[[], FinishReason | None] = lambda: None
    """Why all answers are to end now; None = they go on."""
    answers: dict[int, Answer] = field(default_factory=dict)
    """By slot."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the host, by phase."""

    def __post_init__(self) -> None:
        (self.eos_tensor,) = to_device([self.eos], self.proposer.device)

    def play(self, slots: Sequence[int], widths: Sequence[int], wave: int) -> tuple[list[Trial], Settle]:
        """Try widths[i] attempts for slots[i]; until the result is settled, the round can be repeated.

        wave: attempts of a slot that are scored before the rule judges them; the next ones follow if it took none.

        On a GPU the host queues all of it up to the first wave's rewards, waits in `trials`, and then once for each
        further wave. It waits earlier only for what runs on the host: stop strings, logits processors and reward models
        that read text.
        """
        with self.timed("propose"):
            starts = {slot: self.answers[slot].starts(width) for slot, width in zip(slots, widths, strict=True)}
            rows = self.rows(starts)
        proposal, ends = self.propose(rows)
        self.open(rows, proposal, ends)
        heads = itertools.accumulate(widths, initial=0)
        first = [head + column for head, width in zip(heads, widths, strict=False) for column in range(width)[:wave]]
        scores = self.score(first)  # queued before the host waits for the candidates
        trials, told = self.trials(rows, starts, proposal, ends, scores)
        self.judge(trials, wave, scores, told)
        while following := [row for trial in trials for row in trial.wave(wave)]:
            self.judge(trials, wave, self.score(following))
        return trials, self.commit(trials)

    def rows(self, starts: Mapping[int, Sequence[Candidate]]) -> Rows:
        """Make one row per attempt, grouped by slot; starts: of each slot, what its next attempts start from."""
        numbers, held = list[tuple[int, int, int, int]](), list[list[int]]()
        for slot, mine in starts.items():
            answer = self.answers[slot]
            plan, position = self.rule.plan(answer), len(answer.tokens) + answer.held
            numbers += [(slot, answer.number(plan, start.attempt), answer.key, position) for start in mine]
            held += [start.tokens for start in mine]
        columns = [list(column) for column in zip(*numbers, strict=True)]
        slots, attempts, keys, positions = to_device(columns, self.proposer.device)
        return Rows(columns[0], slots, attempts, keys, positions, columns[1], held if any(held) else ())

    def propose(self, rows: Rows) -> tuple[Proposal, Ends]:
        """Sample a candidate for every row, from one shared prefix per slot, and find where it ends."""
        with self.timed("propose"):
            plans = {slot: self.rule.plan(self.answers[slot]) for slot in set(rows.slots)}
            sizes = [self.answers[slot].size(plans[slot]) for slot in rows.slots]
            # The plans of one round differ in size and attempts alone: `Run._alike` chose the slots by them.
            plan = max(plans.values(), key=lambda plan: plan.attempts)._replace(size=max(sizes))
            proposal = self.proposer.propose(rows, plan, self.sampling, self.noise, self.eos_tensor, self.check_stop)
        with self.timed("judge"):
            (room,) = to_device([sizes], self.proposer.device)
            return proposal, find_ends(self.answers, rows, proposal, room, self.eos_tensor, plan.entropy)

    def check_stop(self) -> None:
        """Raise `Abandoned` where all answers are to end now."""
        if self.stop() is not None:
            raise Abandoned

    def open(self, rows: Rows, proposal: Proposal, ends: Ends) -> None:
        """Hand the candidates, each with what it held before, to the scorer."""
        with self.timed("score"):
            held = rows.held_tokens()
            tokens = torch.cat([held, proposal.tokens.clamp(min=0)], dim=1)
            self.scorer.open(rows, tokens, ends.lengths + held.shape[1])

    def score(self, wave: Sequence[int]) -> Scores:
        """Score the candidates of these rows, each behind its slot's answer."""
        self.check_stop()
        with self.timed("score"):
            return self.scorer.score(wave)

    def trials(
        self, rows: Rows, starts: Mapping[int, Sequence[Candidate]], proposal: Proposal, ends: Ends, scores: Scores
    ) -> tuple[list[Trial], list[list[Any]]]:
        """Make each slot's candidates; read with them, in one wait, the first wave's rewards and tokens read."""
        with self.timed("judge"):
            answers = [self.answers[slot] for slot in rows.slots]
            decided = [len(answer.tokens) for answer in answers]
            uniforms = accept_uniforms([a.key for a in answers], decided, rows.attempts)  # while a GPU is at work
            columns = (scores.rewards, scores.read, proposal.tokens, ends.lengths, ends.stopped, ends.broken)
            rewards, read, tokens, lengths, stopped, broken, logprobs = to_host(
                (*columns, proposal.logprob(ends.lengths))
            )
            faults = faults_of_sampling(broken, proposal.errors, ends.errors)
            trials, head = list[Trial](), 0
            for slot, mine in starts.items():
                room, tried = self.answers[slot].room, list[Candidate]()
                for r, start in enumerate(mine, start=head):
                    drawn = tokens[r][: lengths[r]]
                    tried.append(grown(start, drawn, logprobs[r], uniforms[r], stopped[r], room, self.eos))
                here = range(head, head + len(mine))
                known = {r - head: faults[r] for r in here if r in faults}
                trials.append(Trial(slot, head, tried, sum(len(tokens[r]) for r in here), known))
                head += len(mine)
            return trials, [rewards, read]

    def judge(self, trials: Sequence[Trial], wave: int, scores: Scores, told: list[list[Any]] | None = None) -> None:
        """Let the rule judge a wave's candidates in order, until one is taken or one that failed is reached.

        scores: in the order of `trials`. told: their rewards and tokens read, where the host knows them.
        """
        with self.timed("judge"):
            rewards, read = told or to_host((scores.rewards, scores.read))
            at = 0
            for trial in trials:
                for row in trial.wave(wave):
                    trial.score(row - trial.head, rewards[at], read[at], scores.errors.get(at))
                    at += 1
                trial.judge(self.rule, self.answers[trial.slot])

    def commit(self, trials: Sequence[Trial]) -> Settle:
        """Copy each slot's chosen candidate behind its prefix, which it joins once it is taken.

        While the rule wants more attempts, the best so far is copied too, so that taking it later needs no forward.
        """
        host, last = [], []
        for trial in trials:
            answer, verdict = self.answers[trial.slot], trial.verdict
            if trial.fault is not None or verdict is None or self.rule.plan(answer).race:
                continue  # a race is for the whole answer: nothing comes behind it
            index = verdict.chosen - len(answer.candidates)  # among this round's; < 0: an earlier round's, copied then
            if index < 0 and verdict.outcome is None:
                continue
            chosen = [*answer.candidates, *trial.candidates][verdict.chosen]
            row = trial.head + index if index >= 0 else -1
            host.append((trial.slot, row, len(chosen.tokens), verdict.outcome is not None))
            last.append(chosen.tokens[-1])
        if not host:
            return together([])
        with self.timed("commit"):
            numbers = [*zip(*host, strict=True), last]
            slots, rows, lengths, advance, last_tokens = to_device(numbers, self.proposer.device)
            commit = Commit(host, slots, rows, lengths, advance.bool(), last_tokens)
            return together([self.proposer.commit(commit), self.scorer.commit(commit)])

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
