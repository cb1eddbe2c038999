"""What a decode gives back: the answer and the trace of how it came to be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stars_kernels.decoder.config import StarsConfig

FinishReason = Literal["eos", "stop", "length", "context", "interrupted"]


@dataclass
class Segment:
    """One segment; the last of an interrupted answer may be undecided. The lists have one entry a judged attempt."""

    rewards: list[float] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Tokens of each judged attempt."""
    widths: list[int] = field(default_factory=list)
    """Attempts decoded side by side, a round each."""
    chosen: int = -1
    """The attempt that was taken."""
    outcome: Literal["accepted", "fallback", "undecided"] = "undecided"

    @property
    def attempts(self) -> int:
        return len(self.rewards)

    @property
    def reward(self) -> float:
        return self.rewards[self.chosen]

    @property
    def threshold(self) -> float:
        """tau at the length of the chosen attempt."""
        return self.thresholds[self.chosen]

    @property
    def length(self) -> int:
        return self.lengths[self.chosen]


@dataclass
class Counts:
    """Work done for one prompt."""

    sampled: int = 0
    """Tokens sampled in all rows, those past a candidate's end included."""
    judged: int = 0
    """Tokens of the attempts that were judged: what the sequential algorithm would have sampled."""
    rejected: int = 0
    """Tokens of judged attempts that were not taken."""
    rm_scored: int = 0
    """Tokens the reward model read, the prompt included."""
    attempts: int = 0
    """Judged attempts."""
    accepted: int = 0
    """Accepted attempts (fallbacks are not)."""
    rejections: int = 0
    """Judged attempts that were not taken."""

    @property
    def speculated(self) -> int:
        """Tokens sampled beyond what the sequential algorithm would have."""
        return self.sampled - self.judged

    @property
    def wasted_per_rejection(self) -> float:
        return self.rejected / self.rejections if self.rejections else 0.0

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.attempts if self.attempts else 0.0


@dataclass(frozen=True)
class Calibration:
    """How r* and beta were found, once for all prompts of a call."""

    rewards: list[float]
    """Of the plain continuations."""
    sampled: int
    """Their tokens."""
    rm_scored: int
    """Tokens the reward model read for them."""
    seconds: float


@dataclass
class StarsOutput:
    """An aligned answer."""

    text: str | None
    """None without a tokenizer. Whole characters only; without special tokens and stop string."""
    token_ids: list[int]
    """The answer's tokens, EOS included."""
    reward: float
    """The reward model's reward of the answer."""
    finish_reason: FinishReason
    config: StarsConfig
    """Resolved: seed, r* and beta as used."""
    request_id: int | str
    prompt_reward: float
    """r(x), the reward of the empty answer."""
    segments: list[Segment]
    counts: Counts
    seconds: dict[str, float]
    """Wall seconds by phase, of the lock-step batch this prompt ran in (its batch-mates share them)."""
    calibration: Calibration | None
    """None where r* and beta were given."""
    backends: dict[str, str]
    """Which implementation of each op ran, and of the models' linear layers ("linear")."""

    def __repr__(self) -> str:
        return (
            f"StarsOutput(text={self.text!r}, reward={self.reward:.4f}, finish_reason={self.finish_reason!r}, "
            f"tokens={len(self.token_ids)}, segments={len(self.segments)}, attempts={self.counts.attempts})"
        )
