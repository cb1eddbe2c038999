"""What a request asks of the engine: prompts and settings, checked."""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from stars_kernels.decoder.calibration import is_calibrated, with_target
from stars_kernels.decoder.checks import shown
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.naming import SETTINGS, near, rule_names, rule_of
from stars_kernels.decoder.output import Calibration
from stars_kernels.decoder.rules import Rule, Stars
from stars_kernels.hf.engine import Engine
from stars_kernels.serve.bodies import Body
from stars_kernels.serve.errors import ApiError
from stars_kernels.serve.limits import Limits

SERVERS = frozenset({
    "width", "wave", "batch_size", "pack", "graphs", "progress", "trace", "do_sample", "calibration_samples",
    "calibration_quantile", "calibration_acceptance",
})  # fmt: skip
"""Settings that are the server's: of speed and memory, and such as a request has no use for."""
REQUESTS = tuple(name for name in SETTINGS if name not in SERVERS)
"""Settings that a request may give."""
ATTEMPTS = ("max_attempts", "n", "k")
"""Settings of rules that say how many attempts are made at a segment."""
SEED_BITS = 53
"""Of a seed that is drawn: every JSON reader reads it as it is."""
Target = tuple[float, float | None]
"""r* and beta."""


@dataclass(frozen=True)
class Asked:
    """What one request asks for: `n` answers to each prompt, in the order of the prompts.

    config: with seed, r* and beta. Answer i is decoded with the seed `config.seed + i`.
    """

    prompts: list[Any]
    n: int
    config: StarsConfig

    def __len__(self) -> int:
        return len(self.prompts) * self.n

    def answers(self) -> Iterator[tuple[Any, StarsConfig]]:
        """Yield the prompt and the settings of each answer."""
        assert self.config.seed is not None
        for i in range(len(self)):
            yield self.prompts[i // self.n], self.config.replace(seed=self.config.seed + i)


def target_of(engine: Engine, calibration: Calibration | None) -> Target | None:
    """Return r* and beta for requests that give none of their own, of the calibration or else of the engine.

    Raises ValueError where the engine's own rule needs them and there are none, or the calibration is of other models.
    """
    own, target = engine.config.resolved_rule, cast(Target | None, None)
    if calibration is not None:
        engine.with_calibration(StarsConfig(), calibration)
        target = calibration.reward_threshold, calibration.beta
    elif isinstance(own, Stars) and own.reward_threshold is not None:
        target = own.reward_threshold, own.beta
    check_target(_with(engine.config, target))
    return target


def check_target(config: StarsConfig) -> None:
    """Refuse settings of a server whose rule needs r* and beta and has none."""
    if not is_calibrated(config):
        raise ValueError(
            "the server's rule needs r* and beta, which are not known; expected --calibration FILE, made by `stars "
            "calibrate -m MODEL -r RM -i prompts.jsonl -o FILE`, or --reward-threshold and --beta, or another --rule"
        )


def asked_of(body: Any, engine: Engine, target: Target | None, limits: Limits) -> Asked:
    """Return what a body asks for. Raises ApiError with status 400 where it is wrong, or over a limit."""
    prompts, n = body.prompts(), body.n or 1
    if len(prompts) * n > limits.choices:
        found = f"n is {shown(n)}" if len(prompts) == 1 else f"{len(prompts)} prompts with n = {shown(n)}"
        raise ApiError(400, f"{found}, expected at most {limits.choices} answers of a request", param="n")
    try:
        config = _with(engine.resolve(None, _settings(body, engine.config.rule)), target)
    except (ValueError, TypeError) as error:
        raise ApiError(400, str(error), param=_param(str(error), body)) from None
    if not is_calibrated(config):
        raise ApiError(
            400, "the rule needs reward_threshold (r*) and beta, and the server was started without; expected both in "
            "stars", param="stars",
        )  # fmt: skip
    _check_limits(config, limits, "max_time" in (body.stars or {}))
    max_time = min(config.max_time or limits.max_time, limits.max_time)
    seed = secrets.randbits(SEED_BITS) if config.seed is None else config.seed
    try:
        config.replace(seed=seed + len(prompts) * n - 1)
    except ValueError as error:
        raise ApiError(400, str(error), param="seed") from None
    return Asked(prompts, n, config.replace(seed=seed, max_time=max_time, progress=False))


def _settings(body: Body, own_rule: Rule | None) -> dict[str, Any]:
    """Return the settings that a body gives, the rule made; own_rule: the server's."""
    given, stars = body.settings(), dict(body.stars or {})
    for name in stars:
        if name in SERVERS:
            raise ApiError(400, f"stars.{name} is the server's own setting, expected none", param=f"stars.{name}")
        if name in given:
            raise ApiError(400, f"stars.{name} is given twice, expected it once", param=f"stars.{name}")
    rule = own_rule
    if "rule" in stars:
        rule = rule_of(stars.pop("rule"), stars, "stars.rule")
    elif dataclasses.is_dataclass(own_rule):
        known = {field.name for field in dataclasses.fields(own_rule)}
        changed = {name: stars.pop(name) for name in [*stars] if name in known}
        rule = dataclasses.replace(own_rule, **{k: tuple(v) if isinstance(v, list) else v for k, v in changed.items()})
    for name in stars:
        if name not in REQUESTS:
            own = {field.name for kind in rule_names().values() for field in dataclasses.fields(kind)}
            hint = near(name, [*REQUESTS, *own, "rule"]) or f"; of this rule, expected one of {', '.join(REQUESTS)}"
            raise ApiError(400, f"stars has the unknown setting {shown(name)}{hint}", param=f"stars.{name[:100]}")
    return {**given, **stars, "rule": rule}


def _with(config: StarsConfig, target: Target | None) -> StarsConfig:
    """Return settings with r* and beta, where the rule has these and they are known."""
    if target is None or not isinstance(config.resolved_rule, Stars):
        return config
    return with_target(config, *target)


def _check_limits(config: StarsConfig, limits: Limits, timed: bool) -> None:
    """Refuse what is over a limit; timed: whether max_time is the request's own."""
    if timed and config.max_time is not None and config.max_time > limits.max_time:
        raise ApiError(
            400, f"max_time is {config.max_time}, expected at most {limits.max_time} seconds", param="stars.max_time"
        )
    for name in ATTEMPTS:
        value = getattr(config.resolved_rule, name, 0)
        most = max(value) if isinstance(value, tuple) else value
        if most > limits.attempts:
            raise ApiError(400, f"{name} is {most}, expected at most {limits.attempts}", param=f"stars.{name}")


def _param(message: str, body: Body) -> str | None:
    """Return the key of the body that an error's message begins with."""
    found = re.match(r"\w+", message)
    name = found[0] if found else ""
    outer = {"max_new_tokens": body.length[0], "stop_strings": "stop"}.get(name, name)
    if name in (body.stars or {}):
        return f"stars.{name}"
    return outer if getattr(body, outer, None) is not None and outer in type(body).model_fields else None
