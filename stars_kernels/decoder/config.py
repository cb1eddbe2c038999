"""StarsConfig: every knob of a decode, with the paper's names (arXiv 2511.03827)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from stars_kernels.decoder.checks import SEED_BITS, check, check_count, check_number, is_int, plain
from stars_kernels.decoder.rules import RULES, Rule, Stars
from stars_kernels.decoder.serial import rule_from_plain, rule_to_plain, to_plain
from stars_kernels.ops.philox import MAX_ATTEMPTS, MAX_POSITIONS
from stars_kernels.ops.segment_sample import MAX_TEMPERATURE, MIN_TEMPERATURE

Trace = Literal["segments", "full"]

RULE_SETTINGS = tuple(field.name for field in dataclasses.fields(Stars))
"""Of `Stars`, which are keywords of their own."""


class Settings(TypedDict, total=False):
    """The settings of `StarsConfig`, which explains them, as keywords."""

    segment_size: int
    max_attempts: int
    alpha: float
    beta: float | None
    reward_threshold: float | None
    max_new_tokens: int
    accept: Literal["soft", "hard"]
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    do_sample: bool
    seed: int | None
    width: int | Literal["auto"]
    wave: int | Literal["auto"]
    batch_size: int | Literal["auto"]
    pack: bool | Literal["bfloat16"]
    graphs: bool
    eos_token_id: int | Sequence[int] | None
    stop_strings: str | Sequence[str]
    calibration_samples: int
    calibration_quantile: float
    calibration_acceptance: float
    progress: bool
    max_time: float | None
    rule: Rule | None
    trace: Trace


@dataclass(frozen=True)
class StarsConfig:
    """Settings of STARS decoding. `width`, `wave`, `batch_size`, `graphs` and `progress` change speed and display.

    segment_size: tokens of a segment.
    max_attempts: candidates judged for a segment, at most; then the best of them is taken.
    alpha: where the threshold starts between the prompt's own reward (0) and reward_threshold (1).
    beta: acceptance temperature in the reward model's units; None = calibrated.
    reward_threshold: r*, the target reward in the reward model's units; None = calibrated.
    max_new_tokens: token budget of an answer; also the denominator of the rising threshold.
    accept: "soft" accepts with probability min(1, exp((r - tau) / beta)), "hard" accepts iff r >= tau.
    temperature, top_k, top_p, min_p: of sampling, as in transformers; None, or 0 for top_k, = off. (top_k is 40 as in
        the code of CARDS, which STARS builds on.)
    do_sample: transformers' switch; STARS needs different attempts, so only True is accepted.
    seed: of every random number; None draws one and records it in the output's config.
    width: attempts of a prompt decoded side by side in a round, or "auto".
    wave: how many of these are scored before they are judged, or "auto". What follows is scored only if none was taken,
        so that the reward model is asked about fewer.
    batch_size: prompts decoded side by side, each in a slot that the next one takes when it is finished; or "auto": as
        many as free memory holds, while twice as many would be a fifth faster, at most 256.
    pack: for a model in fp32 on a CPU, keep a packed copy of the linear layers' weights: faster, as much memory again,
        and a row's result is the same to the bit whatever the rows beside it. "bfloat16" rounds the copy: half the
        memory, faster still, other answers.
    graphs: on a GPU, launch each token's step, and each pass of a reward model over token ids, as one CUDA graph.
    eos_token_id: an id or several; None = the model's own, () = never end on a token.
    stop_strings: one or several; an answer ends with the token that completes one, and its text ends before it.
    calibration_samples: plain continuations sampled when r* or beta is not given.
    calibration_quantile: r* = this quantile of their rewards.
    calibration_acceptance: beta such that this share of them would be accepted at r*.
    progress: show a bar on runs longer than a few seconds.
    max_time: seconds that a call may take once its models are loaded, or None. Then all answers end as they are, with
        the reason "time": what is decided of them stays, the segment under decision goes. It is looked at before each
        token is drawn or, on a GPU, enqueued; what a reward function has begun is waited for.
    rule: what decides; None = `Stars` of the settings above that it takes.
    trace: "segments" keeps rewards, thresholds and lengths of all judged attempts, "full" their tokens too.
    resolved_rule: the rule, made of the settings of STARS where none is given.
    """

    segment_size: int = Stars.segment_size
    max_attempts: int = Stars.max_attempts
    alpha: float = Stars.alpha
    beta: float | None = Stars.beta
    reward_threshold: float | None = Stars.reward_threshold
    max_new_tokens: int = 128
    accept: Literal["soft", "hard"] = Stars.accept
    temperature: float = 1.0
    top_k: int | None = 40
    top_p: float | None = None
    min_p: float | None = None
    do_sample: bool = True
    seed: int | None = None
    width: int | Literal["auto"] = "auto"
    wave: int | Literal["auto"] = "auto"
    batch_size: int | Literal["auto"] = "auto"
    pack: bool | Literal["bfloat16"] = True
    graphs: bool = True
    eos_token_id: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    calibration_samples: int = 16
    calibration_quantile: float = 0.9
    calibration_acceptance: float = 0.25
    progress: bool = True
    max_time: float | None = None
    rule: Rule | None = None
    trace: Trace = "segments"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("eos_token_id", "stop_strings") and value is not None:  # one or a list are admitted
                value = tuple(map(plain, value if isinstance(value, list | tuple) else [value]))
            object.__setattr__(self, field.name, plain(value))
        if self.rule is not None:
            self._check_rule()
        else:
            stars = self.resolved_rule  # which checks its settings, and makes them plain numbers
            for name in RULE_SETTINGS:
                object.__setattr__(self, name, getattr(stars, name))
        check_count(self, "max_new_tokens", MAX_POSITIONS)
        check_count(self, "calibration_samples", MAX_ATTEMPTS)
        check(
            self,
            "do_sample",
            self.do_sample is True,
            "True: without sampling all attempts at a segment would be equal",
        )
        check_number(
            self,
            "temperature",
            lambda x: MIN_TEMPERATURE <= x <= MAX_TEMPERATURE,
            "1e-30 to 1e30: at 0 all attempts at a segment would be equal",
        )
        check(
            self,
            "top_k",
            self.top_k is None or (is_int(self.top_k) and self.top_k >= 0 and self.top_k != 1),
            "an integer >= 2, or None or 0 for off: with 1 all attempts at a segment would be equal",
        )
        check_number(self, "top_p", lambda x: 0 < x <= 1, "in (0, 1]", optional=True)
        check_number(self, "min_p", lambda x: 0 <= x < 1, "in [0, 1)", optional=True)
        check(self, "pack", isinstance(self.pack, bool) or self.pack == "bfloat16", "True, False or 'bfloat16'")
        check(self, "trace", self.trace in ("segments", "full"), '"segments" or "full"')
        for name in ("graphs", "progress"):
            check(self, name, isinstance(getattr(self, name), bool), "True or False")
        valid = self.seed is None or (is_int(self.seed) and self.seed.bit_length() <= SEED_BITS)
        check(self, "seed", valid, f"an integer or None (of at most {SEED_BITS} bits)")
        check_number(self, "max_time", lambda x: x > 0, "a number of seconds > 0, or None", optional=True)
        for name in ("width", "wave", "batch_size"):
            value = getattr(self, name)
            check(self, name, value == "auto" or (is_int(value) and value >= 1), 'an integer >= 1 or "auto"')
        eos, stops = self.eos_token_id, self.stop_strings
        valid = eos is None or (isinstance(eos, tuple) and all(is_int(i) for i in eos))
        check(self, "eos_token_id", valid, "an id, a list of ids, or None")
        valid = isinstance(stops, tuple) and all(isinstance(s, str) and s for s in stops)
        check(self, "stop_strings", valid, "non-empty strings")
        for name in ("calibration_quantile", "calibration_acceptance"):
            check_number(self, name, lambda x: 0 < x < 1, "in (0, 1)")

    def _check_rule(self) -> None:
        """Refuse what is no rule, and settings of STARS beside one."""
        is_rule = not isinstance(self.rule, type) and hasattr(self.rule, "plan") and hasattr(self.rule, "judge")
        check(self, "rule", is_rule, "a rule such as BestOf(8)")
        for name in RULE_SETTINGS:
            if getattr(self, name) != getattr(Stars, name):
                raise ValueError(
                    f"{name} is given beside rule={self.rule!r}, which has its own settings; expected no {name}="
                )

    @property
    def resolved_rule(self) -> Rule:
        """The rule, made of the settings of STARS where none is given."""
        return Stars(**{name: getattr(self, name) for name in RULE_SETTINGS}) if self.rule is None else self.rule

    @property
    def sampling(self) -> dict[str, Any]:
        """The keyword arguments of `ops.segment_sample`."""
        return {
            "temperature": self.temperature,
            "top_k": self.top_k or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "min_p": self.min_p or 0.0,
        }

    def replace(self, **changes: Any) -> StarsConfig:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON's own types; the rule as its name and settings."""
        return {**to_plain(dataclasses.replace(self, rule=None)), "rule": rule_to_plain(self.rule)}

    @staticmethod
    def from_dict(data: Mapping[str, Any], rules: Sequence[type] = ()) -> StarsConfig:
        """Make the settings again that `to_dict` gave; rules: of your own that they may name."""
        return StarsConfig(**{**data, "rule": rule_from_plain(data.get("rule"), [*RULES, *rules])})


def resolve_config(config: StarsConfig | Mapping[str, Any] | None, overrides: Mapping[str, Any]) -> StarsConfig:
    """One config from `config` (an object, a mapping, or None for the defaults) and keyword overrides."""
    if config is not None and not isinstance(config, StarsConfig | Mapping):
        raise TypeError(f"config is of type {type(config).__name__}, expected a StarsConfig, a mapping or None")
    names = [field.name for field in dataclasses.fields(StarsConfig)]
    given = {**(config if isinstance(config, Mapping) else {}), **overrides}
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(names)}"
            raise TypeError(f"unknown setting {name!r}{hint}")
    return config.replace(**given) if isinstance(config, StarsConfig) else StarsConfig(**given)
