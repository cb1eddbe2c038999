"""The STARS loop (arXiv 2511.03827), for a batch of prompts in lock-step.

Per round: propose `width` attempts of every unfinished prompt's segment, score them, judge them in the order in which
the sequential algorithm would have tried them, commit. The answer of a prompt is a function of its key and the config,
never of the width or of the other prompts.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.errors import trace_taken_from
from stars_kernels.decoder.memory import MemoryLimits, free_memory, is_out_of_memory
from stars_kernels.decoder.output import Segment
from stars_kernels.decoder.protocols import Commit, Proposer, Rows, Scorer, Settle, together
from stars_kernels.decoder.threshold import start_reward, threshold
from stars_kernels.decoder.transfer import to_device, to_host
from stars_kernels.decoder.width import AcceptanceHistory, Cost, cpu_cost
from stars_kernels.ops import accept
from stars_kernels.ops.accept import ACCEPTED, FALLBACK, NAN
from stars_kernels.ops.philox import STREAM_SAMPLE

_Faults = dict[int, tuple[str, Exception | None]]
"""What is wrong with a row, and the exception that says so."""
BAD_LOGITS = "the logits hold nan or +inf, or are all -inf, expected finite numbers"


@dataclass(frozen=True)
class _Trial:
    """What a round tried for one prompt, on the host; the lists have an entry a row."""

    head: int
    """Its first row in the round."""
    outcome: int
    chosen: int
    """The column to keep: the winner, the best so far, the one that is NaN; -1 = none of this round."""
    faults: _Faults
    """Why a column has no reward, where it is known."""
    rewards: list[float]
    thresholds: list[float]
    tokens: list[list[int]]
    lengths: list[int]
    stopped: list[bool]
    """Whether `find_stop` ends the answer there."""
    rm_scored: list[int]

    @property
    def decided(self) -> bool:
        return self.outcome in (ACCEPTED, FALLBACK)

    @property
    def candidate(self) -> list[int]:
        """The tokens of the chosen column."""
        return self.tokens[self.chosen][: self.lengths[self.chosen]]

    @property
    def kept(self) -> bool:
        """Whether there is something to commit."""
        return self.outcome != NAN and (self.chosen >= 0 or self.decided)


@dataclass
class Loop:
    """Runs one batch: `begin`, then `rounds`; `answers` and `seconds` are readable at any time."""

    proposer: Proposer
    scorer: Scorer
    config: StarsConfig  # with r*, and beta for soft acceptance
    answers: list[Answer]
    eos: tuple[int, ...] = ()
    stream: int = STREAM_SAMPLE
    limits: MemoryLimits = field(default_factory=MemoryLimits)
    """Shrinks where memory runs out."""
    cost: Cost = cpu_cost
    """Of a round, on the device that it runs on: what width="auto" goes by."""
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Bring every answer to its end or its error."""
        self.begin()
        for _ in self.rounds():
            pass

    def close(self) -> None:
        """Free both sides' memory, whoever still refers to them: the frames of an error that is kept, for one."""
        self.proposer.close()
        self.scorer.close()

    def begin(self) -> None:
        """Read the prompts. Where it raises, nothing is done, and less of a batch may fit."""
        prompts = [answer.prompt for answer in self.answers]
        limit = max((a.limit for a in self.answers), default=0)
        size = (limit, min(limit, self.config.segment_size))
        with self._timed("prefill"):
            (self._eos,) = to_device([self.eos], self.proposer.device)
            self.proposer.begin(prompts, *size)
            scores = self.scorer.begin(prompts, *size)
            read = torch.zeros_like(scores.rewards, dtype=torch.int64) if scores.tokens is None else scores.tokens
            rewards, counts = to_host([scores.rewards, read])
        for p, answer in enumerate(self.answers):
            answer.reward = answer.prompt_reward = rewards[p]
            answer.counts.rm_scored += counts[p]
            if p in scores.errors:
                answer.fail("the reward model failed on the empty answer", scores.errors[p])
            elif not math.isfinite(rewards[p]):
                answer.fail(f"the reward of the empty answer is {rewards[p]}, expected a finite number")

    def rounds(self) -> Iterator[list[int]]:
        """Bring every begun answer to its end or its error; yields the prompts of every round, after it.

        Until all that needs memory is done, a round changes nothing. So where memory runs out, it is tried again with
        half the attempts, then with half the prompts. Any other exception (of a model's forward, say) ends the answers
        in the round; a warning that the caller has made an error ends the run.
        """
        history = AcceptanceHistory()
        yield list(range(len(self.answers)))  # begun, or failed there
        while active := [p for p, answer in enumerate(self.answers) if answer.active]:
            turn = active[: self.limits.prompts]
            widths = self._widths(turn, history)
            again = False
            settle: Settle | None = None
            try:
                trials = self._round(turn, widths)
                settle = self._commit(turn, trials)
                self._settle(turn, trials, settle, history)
            except Warning:  # which the caller has made an error
                raise
            except Exception as error:
                again = settle is None and sum(widths) > 1 and is_out_of_memory(error)
                if not again:
                    self.fail(turn, error)
            if again:  # out here nothing holds the round's tensors any more: the exception did
                self._shrink(len(turn), max(widths))
            else:
                yield turn

    def fail(self, prompts: Sequence[int], error: Exception) -> None:
        """End those of `prompts` that have not ended."""
        trace = trace_taken_from(error)
        for p in prompts:
            if self.answers[p].active:
                self.answers[p].fail("the batch failed", error, trace)

    def _shrink(self, prompts: int, width: int) -> None:
        self.limits.halve_round(prompts, width)
        self.proposer.release()
        self.scorer.release()
        free_memory()

    def _widths(self, active: list[int], history: AcceptanceHistory) -> list[int]:
        """How many attempts of each prompt to decode side by side."""
        width, left = self.config.width, [self.config.max_attempts - self.answers[p].segment.attempts for p in active]
        if width == "auto":
            width = history.best_width(len(active), self.config.max_attempts, self.cost)
        return [min(width, self.limits.width or width, attempts) for attempts in left]

    def _round(self, active: list[int], widths: list[int]) -> list[_Trial]:
        """Propose, score and judge widths[i] attempts for prompt active[i]; changes nothing that a repeat would see.

        On a GPU the host issues all of it ahead and waits once, for what it reads at the end. What it has to see before
        (stop strings, logits processors, rewards of texts) it waits for there.
        """
        config = self.config
        with self._timed("propose"):
            rows, room = self._rows(active, widths)
            size = max(min(config.segment_size, self.answers[p].room) for p in active)
            tokens = self.proposer.propose(rows, size, config.sampling, self.stream, self._eos)  # [R, S]
        with self._timed("accept"):
            lengths, broken, stopped, errors = self._lengths(rows, tokens, room)  # [R]
            tokens = tokens.clamp(min=0)
        with self._timed("score"):
            scores = self.scorer.score(rows, tokens, lengths)
        with self._timed("accept"):
            rewards = scores.rewards.masked_fill(broken, math.nan)
            thresholds, *judged = self._judge(active, widths, rows, lengths, rewards)
            read = torch.zeros_like(lengths) if scores.tokens is None else scores.tokens
            by_row = (rewards, thresholds, tokens, lengths, stopped, read)
            outcome, chosen, is_broken, *columns = to_host((*judged, broken, *by_row))
            faults = self._faults(scores.errors, is_broken, errors)
        trials, head = [], 0
        for i, width in enumerate(widths):
            mine = [column[head : head + width] for column in columns]
            own = {row - head: fault for row, fault in faults.items()}
            trials.append(_Trial(head, outcome[i], chosen[i], own, *mine))
            head += width
        return trials

    def _faults(self, unscored: dict[int, Exception], broken: list[bool], unstopped: dict[int, Exception]) -> _Faults:
        """What failed first on each row that has no reward."""
        unsampled = self.proposer.errors
        faults: _Faults = {row: ("the reward model failed", error) for row, error in unscored.items()}
        for row in itertools.compress(range(len(broken)), broken):
            faults[row] = ("a logits processor failed", unsampled[row]) if row in unsampled else (BAD_LOGITS, None)
        return faults | {row: ("a stopping criterion failed", error) for row, error in unstopped.items()}

    def _commit(self, active: list[int], trials: list[_Trial]) -> Settle:
        """Commit what is kept of a judged round on both sides; it shows once the result is called."""
        kept = [(self.answers[p], p, trial) for p, trial in zip(active, trials, strict=True) if trial.kept]
        if not kept:
            return together([])

        candidates = [answer.kept if trial.chosen < 0 else trial.candidate for answer, _, trial in kept]
        host = [
            (p, -1 if trial.chosen < 0 else trial.head + trial.chosen, len(candidate), trial.decided)
            for (_, p, trial), candidate in zip(kept, candidates, strict=True)
        ]
        with self._timed("commit"):
            last = [candidate[-1] for candidate in candidates]
            prompt, row, length, advance, last_token = to_device([*zip(*host, strict=True), last], self.proposer.device)
            commit = Commit(host, prompt, row, length, advance.bool(), last_token)
            return together([self.proposer.commit(commit), self.scorer.commit(commit)])

    def _settle(self, active: list[int], trials: list[_Trial], settle: Settle, history: AcceptanceHistory) -> None:
        """Make what a judged round commits visible, and write the round on its answers."""
        with self._timed("commit"):
            settle()
            for p, trial in zip(active, trials, strict=True):
                self._book(self.answers[p], trial, history)

    def _rows(self, active: list[int], widths: list[int]) -> tuple[Rows, Tensor]:
        """The rows of a round, and how many tokens each has room for [R]."""
        owners = [p for p, width in zip(active, widths, strict=True) for _ in range(width)]
        answers = [self.answers[p] for p in owners]
        columns = (
            owners,
            [self.answers[p].segment.attempts + i for p, n in zip(active, widths, strict=True) for i in range(n)],
            [answer.key for answer in answers],
            [len(answer.tokens) for answer in answers],
            [answer.room for answer in answers],
        )
        *rows, room = to_device(columns, self.proposer.device)
        return Rows(owners, *rows), room

    def _lengths(self, rows: Rows, tokens: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[int, Exception]]:
        """The candidates' true lengths [R] (to EOS, stop or limit), whether each is broken [R] and stopped [R], errors.

        Broken is one that holds a -1, or on which `find_stop` fails: these rows' errors are returned too.
        """
        errors: dict[int, Exception] = {}
        size = tokens.shape[1]
        ends = torch.isin(tokens, self._eos)
        ended = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, size)
        lengths = ended.clamp(max=room)
        stopped = torch.zeros_like(lengths, dtype=torch.bool)
        if any(answer.find_stop is not None for answer in self.answers):
            cut, candidates = to_host((lengths, tokens))
            for r, (p, candidate) in enumerate(zip(rows.owners, candidates, strict=True)):
                accepted, find_stop = self.answers[p].tokens, self.answers[p].find_stop
                if find_stop is not None:
                    usable = itertools.takewhile(lambda token: token >= 0, candidate[: cut[r]])
                    try:
                        stop = find_stop([*accepted, *usable], len(accepted))
                    except Exception as error:  # of a candidate that may never be judged
                        if is_out_of_memory(error):
                            raise
                        errors[r], stop = error, None
                    if stop is not None:
                        cut[r], stopped[r] = stop - len(accepted), True
            (lengths,) = to_device([cut], tokens.device)
        inside = torch.arange(size, device=tokens.device) < lengths[:, None]
        broken = ((tokens < 0) & inside).any(dim=1)
        if errors:
            broken[list(errors)] = True
        return lengths, broken, stopped, errors

    def _judge(
        self, active: list[int], widths: list[int], rows: Rows, lengths: Tensor, rewards: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The threshold of each row [R]; outcome and chosen column of each prompt [C]."""
        config, device = self.config, rewards.device
        target, beta = config.reward_threshold, config.beta
        assert target is not None
        segments = [self.answers[p].segment for p in active]
        r0 = [start_reward(a.prompt_reward, target, config.alpha) for a in self.answers]
        best = [s.rewards[s.chosen] if s.attempts else -math.inf for s in segments]  # of the rejected so far
        start, best_reward = to_device([r0, best], device, torch.float64)
        count, best_attempt = to_device([widths, [s.chosen for s in segments]], device)
        thresholds = threshold((rows.position + lengths).double(), start[rows.prompt], target, config.max_new_tokens)

        column = torch.arange(max(widths), device=device)  # [W]
        valid = column < count[:, None]  # [C, W]
        head = count.cumsum(0) - count  # [C] the first row of each prompt: rows are grouped by prompt
        row = (head[:, None] + column).clamp(max=len(rows) - 1)  # [C, W]
        chosen, outcome = accept(
            rewards[row],
            valid,
            thresholds[row],
            rows.key[head],
            rows.position[head],
            rows.attempt[head],
            best_reward,
            best_attempt,
            max_attempts=config.max_attempts,
            beta=1.0 if beta is None else beta,  # hard acceptance needs none
            hard=config.accept == "hard",
        )
        return thresholds, outcome, chosen

    def _book(self, answer: Answer, trial: _Trial, history: AcceptanceHistory) -> None:
        """Write a prompt's part of the round on its answer."""
        segment, counts, column = answer.segment, answer.counts, trial.chosen
        counts.sampled += sum(len(tokens) for tokens in trial.tokens)
        counts.rm_scored += sum(trial.rm_scored)
        if trial.outcome == NAN:
            what, cause = trial.faults.get(column, ("the reward is nan, expected a number", None))
            answer.fail(f"attempt {segment.attempts + column}: {what}", cause)
            return

        before, width = segment.attempts, len(trial.rewards)
        judged = column + 1 if trial.outcome == ACCEPTED else width
        segment.rewards += trial.rewards[:judged]
        segment.thresholds += trial.thresholds[:judged]
        segment.lengths += trial.lengths[:judged]
        segment.widths.append(width)
        counts.judged += sum(trial.lengths[:judged])
        counts.attempts += judged
        history.judged += judged
        if column >= 0:
            segment.chosen = before + column
            answer.kept = trial.candidate
            answer.kept_stops = trial.stopped[column]
        if trial.decided:
            self._take(answer, segment, trial.outcome == ACCEPTED, history)

    def _take(self, answer: Answer, segment: Segment, accepted: bool, history: AcceptanceHistory) -> None:
        """The chosen candidate becomes a part of the answer, and may end it."""
        config, counts = self.config, answer.counts
        segment.outcome = "accepted" if accepted else "fallback"
        counts.accepted += accepted
        history.accepted += accepted
        counts.rejections += segment.attempts - 1
        counts.rejected += sum(segment.lengths) - segment.length
        answer.tokens += answer.kept
        answer.reward = segment.reward
        if answer.kept_stops:
            answer.finish_reason = "stop"
        elif answer.tokens[-1] in self.eos:
            answer.finish_reason = "eos"
        elif answer.room == 0:
            answer.finish_reason = "length" if answer.limit == config.max_new_tokens else "context"

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
