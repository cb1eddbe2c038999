"""What a decode gives back: the answer and the trace of how it came to be."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.serial import VERSION, checked_version, floats, to_plain

FinishReason = Literal["eos", "stop", "length", "context", "time", "cancelled", "interrupted"]


@dataclass
class Segment:
    """One segment; the last of an interrupted answer may be undecided.

    rewards, thresholds, lengths: of each judged attempt, its threshold tau (NaN where the rule has none), its tokens.
    widths: attempts decoded side by side, a round each.
    tokens: of each judged attempt, cut where it ends; None unless trace="full".
    chosen: index in these lists of what was taken, or as long as it is undecided of the best so far.
    outcome: "accepted", "fallback" (max_attempts were rejected, the best of them was taken), "best" (a rule that
        takes the best) or "undecided".
    kept: of a race, the numbers of the attempts that went on, at each border. The lists above have the attempts that
        grew in each turn, one turn after the other, with the tokens that they then had.
    reward, threshold, length: of the chosen attempt. attempts: how many were judged; in a race, once per turn each.
    """

    rewards: list[float] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    tokens: list[list[int]] | None = None
    chosen: int = -1
    outcome: Literal["accepted", "fallback", "best", "undecided"] = "undecided"
    kept: list[list[int]] = field(default_factory=list)

    @property
    def attempts(self) -> int:
        return len(self.rewards)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Segment:
        """Make the segment again of which `StarsOutput.to_dict` wrote this."""
        numbers = {name: floats(data[name]) for name in ("rewards", "thresholds")}
        return Segment(**{**data, **numbers})

    @property
    def reward(self) -> float:
        return self.rewards[self.chosen]

    @property
    def threshold(self) -> float:
        return self.thresholds[self.chosen]

    @property
    def length(self) -> int:
        return self.lengths[self.chosen]


@dataclass
class Counts:
    """Work done for one prompt, in tokens or attempts.

    prompt: the prompt's tokens.
    sampled: tokens sampled in all rows, those past a candidate's end included.
    judged: tokens of the attempts that were judged: what the sequential algorithm would have sampled.
    rejected: tokens of judged attempts that were not taken.
    rm_scored: tokens the reward model read, by its own tokenizer, the prompt included; 0 for a function
        of texts and for a head on hidden states.
    shared: prompt tokens that the language model did not read, as another prompt of the call, or of an earlier call of
        the engine, began with them, or that prompt and its answer, and what was kept of these was used again. A reward
        model that reads the same tokens does so too.
    attempts: judged attempts.
    accepted: accepted attempts (fallbacks are not).
    rejections: judged attempts that were not taken.
    speculated: tokens sampled beyond what the sequential algorithm would have.
    wasted_per_rejection: rejected / rejections. acceptance_rate: accepted / attempts.
    """

    prompt: int = 0
    sampled: int = 0
    judged: int = 0
    rejected: int = 0
    rm_scored: int = 0
    shared: int = 0
    attempts: int = 0
    accepted: int = 0
    rejections: int = 0

    @property
    def speculated(self) -> int:
        return self.sampled - self.judged

    @property
    def wasted_per_rejection(self) -> float:
        return self.rejected / self.rejections if self.rejections else 0.0

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.attempts if self.attempts else 0.0


@dataclass(frozen=True)
class Calibration:
    """r* and beta, found from the rewards of plain continuations of some prompts; can be saved, and passed to any call.

    reward_threshold: r*, the `quantile` of the rewards, or as it was given.
    beta: such that the share `acceptance` of the rewards would be accepted at r*.
    quantile, acceptance: the settings calibration_quantile and calibration_acceptance.
    rewards: of the plain continuations.
    sampled: their tokens.
    rm_scored: tokens that the reward model read for them.
    seconds: of wall time.
    model, reward_model: fingerprints (`stars_kernels.hf.fingerprint`): r* and beta mean nothing to other models.
    """

    reward_threshold: float
    beta: float
    quantile: float
    acceptance: float
    rewards: list[float]
    sampled: int
    rm_scored: int
    seconds: float
    model: str
    reward_model: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON's own types."""
        return {"version": VERSION, **to_plain(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Calibration:
        """Make the calibration again that `to_dict` gave."""
        return Calibration(**checked_version(data, "the calibration"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Read it from a file that `save` wrote."""
        return Calibration.from_dict(json.loads(Path(path).read_text()))


@dataclass
class StarsOutput:
    """An aligned answer.

    text: whole characters only, without special tokens and stop string; None without a tokenizer.
    token_ids: the answer's tokens, EOS included.
    reward: the reward model's reward of the answer.
    finish_reason: why the answer ended: "eos" (an end-of-sequence token), "stop" (a stop string), "length"
        (max_new_tokens), "context" (the context limit of a model), "time" (max_time), "cancelled" (by
        `cancel`) or "interrupted" (from the keyboard, or by whatever else ended the call). Of the last
        three, what was decided is here; where the prompt was not even read, the rewards are NaN.
    config: as resolved: seed, r* and beta as used.
    request_id: as given, or a hash of the prompt's token ids and how many equal prompts came before it.
    prompt_reward: r(x), the reward of the empty answer.
    segments: the trace, a `Segment` each.
    counts: the work done for this prompt, a `Counts`.
    seconds: wall seconds of the host by phase, from where this prompt was admitted to its end; those that were decoded
        beside it share them. A GPU's work shows where the host waits for it: for the rewards of each wave, in "judge".
    calibration: a `Calibration`; None where r* and beta were given as settings, or the rule has none.
    backends: which implementation of each op ran, and of the models' linear layers ("linear"); which logits processors
        were asked ("processors"); on a GPU how many CUDA graphs were captured since the call began, in how many
        seconds, and how often any was replayed ("graphs").
    memory_limits: what running out of memory reduced, and to what: "batch_size", "width".
    """

    text: str | None
    token_ids: list[int]
    reward: float
    finish_reason: FinishReason
    config: StarsConfig
    request_id: int | str
    prompt_reward: float
    segments: list[Segment]
    counts: Counts
    seconds: dict[str, float]
    calibration: Calibration | None
    backends: dict[str, str]
    memory_limits: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON's own types, NaN and infinities as strings, with the version of this form."""
        parts = {"config": self.config.to_dict(), "calibration": self.calibration and self.calibration.to_dict()}
        return {"version": VERSION, **to_plain(self), **parts}

    @staticmethod
    def from_dict(data: Mapping[str, Any], rules: Sequence[type] = ()) -> StarsOutput:
        """Make the output again that `to_dict` gave.

        rules: dataclasses of your own, where the answer was decoded by a rule that is not this package's.
        """
        known = checked_version(data, "the output")
        calibration = known["calibration"]
        parts = {
            "reward": float(known["reward"]),
            "prompt_reward": float(known["prompt_reward"]),
            "config": StarsConfig.from_dict(known["config"], rules),
            "segments": [Segment.from_dict(segment) for segment in known["segments"]],
            "counts": Counts(**known["counts"]),
            "calibration": None if calibration is None else Calibration.from_dict(calibration),
        }
        return StarsOutput(**(known | parts))

    def __repr__(self) -> str:
        return (
            f"StarsOutput(text={self.text!r}, reward={self.reward:.4f}, finish_reason={self.finish_reason!r}, "
            f"tokens={len(self.token_ids)}, segments={len(self.segments)}, attempts={self.counts.attempts})"
        )


@dataclass(frozen=True)
class StarsEvent:
    """What `stream` yields: a segment that a prompt's answer grew by, or its end, or both.

    index: the prompt's place in the list.
    request_id: as in its `StarsOutput`; None if it failed before it had one.
    token_ids: the tokens that the answer grew by.
    text: the text that it grew by; None without a tokenizer. A prompt's texts, joined, are its output's text: half a
        character, and what may become a stop string, are held back.
    segment: the trace of the segment; None for a failure.
    output: None until the prompt is finished; then its `StarsOutput`, or the exception that ended it.
    """

    index: int
    request_id: int | str | None
    token_ids: list[int]
    text: str | None
    segment: Segment | None
    output: StarsOutput | Exception | None
