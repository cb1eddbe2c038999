"""The STARS loop (arXiv 2511.03827), for a batch of prompts in lock-step.

Per round: propose `width` attempts of every unfinished prompt's segment, score them, judge them in the order in which
the sequential algorithm would have tried them, commit. The answer of a prompt is a function of its key and the config,
never of the width or of the other prompts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.output import Counts, FinishReason, Segment
from stars_kernels.decoder.protocols import Commit, Proposer, Rows, Scorer
from stars_kernels.decoder.threshold import start_reward, threshold
from stars_kernels.decoder.width import AcceptanceHistory
from stars_kernels.ops import accept
from stars_kernels.ops.accept import ACCEPTED, FALLBACK, NAN
from stars_kernels.ops.philox import STREAM_SAMPLE

FindStop = Callable[[list[int], int], int | None]
"""(answer tokens, tokens accepted before) -> answer tokens up to the one that completes a stop string, or None."""


@dataclass
class Answer:
    """One prompt on its way."""

    key: int
    prompt: Sequence[int]
    limit: int
    """Tokens the answer may have: the budget, or less where the context ends."""
    tokens: list[int] = field(default_factory=list)
    reward: float = math.nan
    prompt_reward: float = math.nan
    segments: list[Segment] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    candidate: list[int] = field(default_factory=list)
    """The best rejected attempt of the current segment."""

    @property
    def active(self) -> bool:
        return self.finish_reason is None and self.error is None

    @property
    def segment(self) -> Segment:
        """The segment under decision."""
        if not self.segments or self.segments[-1].outcome != "undecided":
            self.segments.append(Segment())
        return self.segments[-1]

    def fail(self, what: str, cause: BaseException | None = None) -> None:
        self.error = RuntimeError(f"segment {max(len(self.segments) - 1, 0)}: {what}")
        self.error.__cause__ = cause


@dataclass
class Loop:
    """Runs one batch; `answers` and `seconds` are readable at any time, also after an interrupt."""

    proposer: Proposer
    scorer: Scorer
    config: StarsConfig  # r* and beta given
    answers: list[Answer]
    eos: tuple[int, ...] = ()
    find_stop: FindStop | None = None
    stream: int = STREAM_SAMPLE
    on_tokens: Callable[[int], None] = lambda count: None
    """Told how many answer tokens a round added (for progress)."""
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        self._begin()
        history = AcceptanceHistory()
        while active := [p for p, answer in enumerate(self.answers) if answer.active]:
            width = self.config.width
            if width == "auto":
                width = history.best_width(len(active), self.config.max_attempts)
            self._round(active, width, history)

    def _begin(self) -> None:
        prompts = [answer.prompt for answer in self.answers]
        size = (max((a.limit for a in self.answers), default=0), self.config.segment_size)
        with self._timed("prefill"):
            self.proposer.begin(prompts, *size)
            scores = self.scorer.begin(prompts, *size)
        rewards = scores.rewards.tolist()
        for p, answer in enumerate(self.answers):
            answer.reward = answer.prompt_reward = rewards[p]
            answer.counts.rm_scored += 0 if scores.tokens is None else int(scores.tokens[p])
            if p in scores.errors:
                answer.fail("the reward model failed on the empty answer", scores.errors[p])
            elif math.isnan(rewards[p]):
                answer.fail("the reward of the empty answer is nan, expected a number")

    def _round(self, active: list[int], width: int, history: AcceptanceHistory) -> None:
        config, device = self.config, self.proposer.device
        first = [self.answers[p].segment.attempts for p in active]
        widths = [min(width, config.max_attempts - a) for a in first]
        rows = self._rows(active, first, widths)
        room = max(min(config.segment_size, self.answers[p].limit - len(self.answers[p].tokens)) for p in active)

        with self._timed("propose"):
            eos = torch.tensor(self.eos, dtype=torch.int64, device=device)
            tokens = self.proposer.propose(rows, room, config.sampling, self.stream, eos)  # [R, S]
        with self._timed("accept"):
            lengths, broken = self._lengths(rows, tokens, eos)  # [R]
            tokens = tokens.clamp(min=0)
        with self._timed("score"):
            scores = self.scorer.score(rows, tokens, lengths)
        with self._timed("accept"):
            rewards = scores.rewards.masked_fill(broken, math.nan)
            outcome, chosen, taus = self._judge(active, widths, rows, lengths, rewards)
            commit = self._decide(
                active, widths, outcome, chosen, taus, rewards.tolist(), lengths.tolist(), tokens.tolist(),
                broken.tolist(), scores.errors, history, None if scores.tokens is None else scores.tokens.tolist(),
            )  # fmt: skip
        with self._timed("commit"):
            if commit is not None:
                self.proposer.commit(commit)
                self.scorer.commit(commit)

    def _rows(self, active: list[int], first: list[int], widths: list[int]) -> Rows:
        answers = [self.answers[p] for p in active]
        repeats = torch.tensor(widths)

        def per_row(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64).repeat_interleave(repeats).to(self.proposer.device)

        attempts = [a for start, w in zip(first, widths, strict=True) for a in range(start, start + w)]
        return Rows(
            prompt=per_row(active),
            attempt=torch.tensor(attempts, dtype=torch.int64, device=self.proposer.device),
            key=per_row([answer.key for answer in answers]),
            position=per_row([len(answer.tokens) for answer in answers]),
        )

    def _lengths(self, rows: Rows, tokens: Tensor, eos: Tensor) -> tuple[Tensor, Tensor]:
        """Each candidate's true length [R] (to its EOS, its stop string or its limit) and whether it holds a -1 [R]."""
        size = tokens.shape[1]
        owners = rows.prompt.tolist()
        room = [self.answers[p].limit - len(self.answers[p].tokens) for p in owners]
        ends = torch.isin(tokens, eos)
        ended = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, size)
        lengths = ended.clamp(max=torch.tensor(room, device=tokens.device))
        if self.find_stop is not None:
            cut = lengths.tolist()
            for r, (p, candidate) in enumerate(zip(owners, tokens.tolist(), strict=True)):
                accepted = self.answers[p].tokens
                stop = self.find_stop(accepted + [max(t, 0) for t in candidate[: cut[r]]], len(accepted))
                cut[r] = cut[r] if stop is None else stop - len(accepted)
            lengths = torch.tensor(cut, device=tokens.device)
        inside = torch.arange(size, device=tokens.device) < lengths[:, None]
        return lengths, ((tokens < 0) & inside).any(dim=1)

    def _judge(
        self, active: list[int], widths: list[int], rows: Rows, lengths: Tensor, rewards: Tensor
    ) -> tuple[list[int], list[int], list[float]]:
        """Outcome and chosen column of each prompt, and the threshold of each row."""
        config, device = self.config, rewards.device
        target, beta = config.reward_threshold, config.beta
        assert target is not None and beta is not None
        r0 = [start_reward(a.prompt_reward, target, config.alpha) for a in self.answers]
        start = torch.tensor(r0, dtype=torch.float64, device=device)[rows.prompt]
        taus = threshold((rows.position + lengths).double(), start, target, config.max_new_tokens)

        valid = torch.arange(max(widths)) < torch.tensor(widths)[:, None]  # [C, W]
        grid = torch.zeros(2, *valid.shape, dtype=torch.float64, device=device)
        valid = valid.to(device)
        grid[0][valid], grid[1][valid] = rewards, taus  # rows are grouped by prompt, as the grid is
        head = torch.tensor(widths, device=device).cumsum(0) - torch.tensor(widths, device=device)  # first row of each
        best_reward, best_attempt = self._best(active, device)
        chosen, outcome = accept(
            grid[0], valid, grid[1], rows.key[head], rows.position[head], rows.attempt[head], best_reward, best_attempt,
            max_attempts=config.max_attempts, beta=beta, hard=config.accept == "hard",
        )  # fmt: skip
        return outcome.tolist(), chosen.tolist(), taus.tolist()

    def _best(self, active: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """The best rejected attempt so far of each prompt's segment, as `accept` wants it."""
        segments = [self.answers[p].segment for p in active]
        rewards = [s.rewards[s.chosen] if s.attempts else -math.inf for s in segments]
        return (
            torch.tensor(rewards, dtype=torch.float64, device=device),
            torch.tensor([s.chosen for s in segments], dtype=torch.int64, device=device),
        )

    def _decide(
        self, active: list[int], widths: list[int], outcome: list[int], chosen: list[int], taus: list[float],
        rewards: list[float], lengths: list[int], tokens: list[list[int]], broken: list[bool],
        errors: dict[int, Exception], history: AcceptanceHistory, scored: list[int] | None,
    ) -> Commit | None:  # fmt: skip
        """Book the round on the answers; what to commit, or None when nothing is."""
        entries: list[tuple[int, int, int, bool, int]] = []
        row = 0
        for i, p in enumerate(active):
            answer, head, width, column = self.answers[p], row, widths[i], chosen[i]
            row += width
            segment, counts = answer.segment, answer.counts
            counts.sampled += width * len(tokens[head])
            counts.rm_scored += 0 if scored is None else sum(scored[head : head + width])
            judged = column + 1 if outcome[i] in (ACCEPTED, NAN) else width
            if p in errors:
                answer.fail("the reward model failed", errors[p])
                continue
            if outcome[i] == NAN:
                what = "the logits hold nan or +inf, or are all -inf" if broken[head + column] else "the reward is nan"
                answer.fail(f"attempt {segment.attempts + column}: {what}, expected finite numbers")
                continue

            tried = slice(head, head + judged)
            before = segment.attempts
            segment.rewards += rewards[tried]
            segment.thresholds += taus[tried]
            segment.lengths += lengths[tried]
            segment.widths.append(width)
            if column >= 0:
                segment.chosen = before + column
                answer.candidate = tokens[head + column][: lengths[head + column]]
            counts.judged += sum(lengths[tried])
            counts.attempts += judged
            history.judged += judged
            decided = outcome[i] in (ACCEPTED, FALLBACK)
            if column >= 0 or decided:
                winner = -1 if column < 0 else head + column
                entries.append((p, winner, len(answer.candidate), decided, answer.candidate[-1]))
            if decided:
                self._take(answer, segment, outcome[i] == ACCEPTED, history)
        if not entries:
            return None
        prompt, winner, length, advance, last = (
            torch.tensor(column, device=self.proposer.device) for column in zip(*entries, strict=True)
        )
        return Commit(prompt, winner, length, advance, last)

    def _take(self, answer: Answer, segment: Segment, accepted: bool, history: AcceptanceHistory) -> None:
        """The chosen candidate becomes a part of the answer, and may end it."""
        config, counts = self.config, answer.counts
        segment.outcome = "accepted" if accepted else "fallback"
        counts.accepted += accepted
        history.accepted += accepted
        counts.rejections += segment.attempts - 1
        counts.rejected += sum(segment.lengths) - segment.length
        before = len(answer.tokens)
        answer.tokens += answer.candidate
        answer.reward = segment.reward
        stopped = self.find_stop is not None and self.find_stop(answer.tokens, before) is not None
        if stopped:
            answer.finish_reason = "stop"
        elif answer.tokens[-1] in self.eos:
            answer.finish_reason = "eos"
        elif len(answer.tokens) >= answer.limit:
            answer.finish_reason = "length" if answer.limit == config.max_new_tokens else "context"
        self.on_tokens(len(answer.candidate))

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
