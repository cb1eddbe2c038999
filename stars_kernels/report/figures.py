"""The figures of a run: what stands on the cards of a report, and what is told under them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from stars_kernels.decoder.config import RULE_SETTINGS
from stars_kernels.report.source import Row, Run

TESTS = ("accepted", "fallback")
"""Outcomes of rules that accept or reject."""
NOT_SHOWN = ("rule", "progress")
"""Settings that are told elsewhere, or are of no matter."""


def cards(run: Run, digits: int) -> list[dict[str, str]]:
    """Return the cards of a run: a label, a value and a note each. digits: of rewards, behind the point."""
    answered = [row for row in run.rows if row.answer is not None]
    found = [_answers(run, len(answered))]
    if answered:
        found += [_rewards(answered, digits), *_target(run, digits), *_decisions(answered), _waste(answered)]
        found += [_tokens(answered), *_work(answered), *_speed(run, answered)]
    return found


def headline(run: Run) -> list[str]:
    """Return what a run was, in a few words each."""
    settings, told = run.rule_settings, [run.rule]
    if "n" in settings:
        told.append(f"n = {_plain(settings['n'])}")
    if "segment_size" in settings:
        told.append(f"segments of {_count(settings['segment_size'], 'token')}")
    if "max_attempts" in settings:
        told.append(f"up to {_count(settings['max_attempts'], 'attempt')}")
    if settings.get("accept") == "hard":
        told.append("hard")
    told.append(f"answers of up to {_count(run.config['max_new_tokens'], 'token')}")
    return [*told, f"seed {run.config['seed']}"]


def facts(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return what else is told of a run: groups of names and values."""
    stars = run.config.get("rule") is None
    of_rule = {name: run.config[name] for name in RULE_SETTINGS} if stars else run.rule_settings
    groups: dict[str, Mapping[str, Any]] = {
        "Rule": {"name": run.rule, **of_rule},
        "Settings": {name: value for name, value in run.config.items() if name not in RULE_SETTINGS},
        "Models": run.models,
        "Calibration": _of_calibration(run),
        "Implementations": _merged(row.cost.get("backends", {}) for row in run.rows),
        "Versions": run.versions,
        "Less memory than wished for": _merged(row.cost.get("memory_limits", {}) for row in run.rows),
    }
    return [
        (title, [(name, _plain(value)) for name, value in group.items() if name not in NOT_SHOWN])
        for title, group in groups.items()
        if group
    ]


def phases(run: Run) -> dict[str, float]:
    """Return the mean seconds of an answer in each phase; those that are decoded side by side share them."""
    found, rows = dict[str, float](), [row for row in run.rows if row.cost.get("seconds")]
    for row in rows:
        for phase, seconds in row.cost["seconds"].items():
            found[phase] = found.get(phase, 0.0) + float(seconds) / len(rows)
    return {phase: seconds for phase, seconds in found.items() if seconds > 0}


def reward_digits(runs: Iterable[Run]) -> int:
    """Return how many digits behind the point tell rewards apart: three where they spread over 0.2 to 2."""
    answers = [row.answer for run in runs for row in run.rows if row.answer is not None]
    rewards = [float(answer[name]) for answer in answers for name in ("reward", "prompt_reward")]
    rewards = [reward for reward in rewards if math.isfinite(reward)]
    spread = max(rewards) - min(rewards) if rewards else 0.0
    size = spread or max(map(abs, rewards), default=1.0) or 1.0
    return min(8, max(0, math.ceil(2.3 - math.log10(size))))


def fixed(value: float, digits: int) -> str:
    """Write a number with so many digits, and a minus sign that is as wide as a plus."""
    if math.isnan(value):
        return "no number"
    text = f"{value:,.{digits}f}" if math.isfinite(value) else ("∞" if value > 0 else "-∞")
    return text.replace("-", "\u2212")


def _answers(run: Run, answered: int) -> dict[str, str]:
    failed = sum(row.error is not None for row in run.rows)
    left = run.prompts - len(run.rows)
    others = [f"{count:,} {what}" for count, what in ((failed, "failed"), (left, "left")) if count]
    return _card("Answers", f"{answered:,}", ", ".join(others) or f"of {_count(run.prompts, 'prompt')}")


def _rewards(rows: list[Row], digits: int) -> dict[str, str]:
    pairs = [(float(row.answer["reward"]), float(row.answer["prompt_reward"])) for row in rows if row.answer]
    known = [pair for pair in pairs if not any(map(math.isnan, pair))]
    if not known:
        return _card("Mean reward", "none", "no answer has one")
    reward, empty = (sum(values) / len(known) for values in zip(*known, strict=True))
    gain = fixed(reward - empty, digits)
    sign = "" if gain.startswith("\u2212") or not math.isfinite(reward - empty) else "+"
    of = f", of {_count(len(known), 'answer')}" if len(known) < len(rows) else ""
    return _card(
        "Mean reward", fixed(reward, digits), f"{sign}{gain} over the empty answer's {fixed(empty, digits)}{of}"
    )


def _target(run: Run, digits: int) -> list[dict[str, str]]:
    target, beta = run.rule_settings.get("reward_threshold"), run.rule_settings.get("beta")
    if target is None:
        return []
    how = "given" if run.calibration is None else f"from {_count(len(run.calibration['rewards']), 'plain answer')}"
    told = how if beta is None or run.rule_settings.get("accept") == "hard" else f"beta {float(beta):.3g}, {how}"
    return [_card("Target r*", fixed(float(target), digits), told)]


def _decisions(rows: list[Row]) -> list[dict[str, str]]:
    """The acceptance rate and the fallbacks; of a rule without a test, its segments and attempts."""
    outcomes = [segment["outcome"] for row in rows if row.answer for segment in row.answer["segments"]]
    attempts = _sum(rows, "attempts")
    if not any(outcome in TESTS for outcome in outcomes):
        return [_card("Attempts", f"{attempts:,}", f"at {_count(len(outcomes), 'segment')}, the best taken")]
    accepted, fallbacks = outcomes.count("accepted"), outcomes.count("fallback")
    return [
        _card("Accepted", _percent(accepted, attempts), f"{accepted:,} of {_count(attempts, 'attempt')}"),
        _card("Fallbacks", f"{fallbacks:,}", f"of {_count(len(outcomes), 'segment')}"),
    ]


def _waste(rows: list[Row]) -> dict[str, str]:
    rejected, rejections = _sum(rows, "rejected"), _sum(rows, "rejections")
    value = f"{rejected / rejections:,.1f}" if rejections else "0"
    return _card("Tokens per rejection", value, f"{rejected:,} in {_count(rejections, 'rejection')}")


def _tokens(rows: list[Row]) -> dict[str, str]:
    tokens = sum(len(row.answer["token_ids"]) for row in rows if row.answer)
    return _card("Answer tokens", f"{tokens:,}", f"{tokens / len(rows):,.1f} an answer")


def _work(rows: list[Row]) -> list[dict[str, str]]:
    """Tokens that the models worked on, of the rows whose costs are known."""
    known = [row for row in rows if "sampled" in row.cost.get("counts", {})]
    if not known:
        return []
    tokens = sum(len(row.answer["token_ids"]) for row in known if row.answer) or 1
    names = ("sampled", "rm_scored", "shared")
    sampled, scored, shared = (sum(row.cost["counts"][name] for row in known) for name in names)
    read = f"{scored / tokens:,.1f} per answer token" if scored else "the reward reads none"
    more = f", {shared:,} shared" if shared else ""
    return [
        _card("Sampled tokens", f"{sampled:,}", f"{sampled / tokens:,.1f} per answer token{more}"),
        _card("Reward-model tokens", f"{scored:,}", read),
    ]


def _speed(run: Run, rows: list[Row]) -> list[dict[str, str]]:
    if not run.seconds:
        return []
    tokens = sum(len(row.answer["token_ids"]) for row in rows if row.answer and row.cost)
    return [_card("Tokens a second", f"{tokens / run.seconds:,.1f}", f"{_duration(run.seconds)} of decoding")]


def _of_calibration(run: Run) -> dict[str, Any]:
    if run.calibration is None:
        return {}
    names = ("reward_threshold", "beta", "quantile", "acceptance", "sampled", "rm_scored", "seconds")
    return {"plain answers": len(run.calibration["rewards"]), **{name: run.calibration[name] for name in names}}


def _merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return every value that a name has, of some mappings."""
    found = dict[str, set[str]]()
    for part in parts:
        for name, value in part.items():
            found.setdefault(name, set()).add(_plain(value))
    return {name: ", ".join(sorted(values)) for name, values in found.items()}


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return str(value)


def _sum(rows: list[Row], name: str) -> int:
    return sum(int(row.answer["counts"][name]) for row in rows if row.answer)


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {round(seconds) % 60} s"


def _card(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}
