"""What the words of a command line mean: rules and settings."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from stars_kernels.decoder.config import RULE_SETTINGS, StarsConfig
from stars_kernels.decoder.rules import RULES, Rule, Stars
from stars_kernels.hf.by_name import number_of

SETTINGS = tuple(field.name for field in dataclasses.fields(StarsConfig) if field.name != "rule")


class UsageError(ValueError):
    """What a command was given cannot be meant."""


def rule_names() -> dict[str, type[Any]]:
    """Return the rules by the names that they have on a command line."""
    return {re.sub(r"(?<!^)(?=[A-Z])", "-", rule.__name__).lower(): rule for rule in RULES}


def rule_of(name: str | None, settings: dict[str, Any]) -> Rule | None:
    """Make the rule of this name, and take its settings out of `settings`; None = STARS, whose are `StarsConfig`'s."""
    names = rule_names()
    if name is None or names.get(name) is Stars:
        return None
    if name not in names:
        raise UsageError(f"--rule is {name!r}, expected one of {', '.join(names)}{_near(name, names)}")
    kind = names[name]
    own = {field.name for field in dataclasses.fields(kind)}
    given = {
        key: settings.pop(key) for key in [*settings] if key in own and (key in RULE_SETTINGS or key not in SETTINGS)
    }
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})


def parsed(pairs: Iterable[str]) -> dict[str, Any]:
    """Read `name=value` pairs, the values as YAML has them: 3, 0.5, true, [8, 4], null, text."""
    found = dict[str, Any]()
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"--set is {pair!r}, expected NAME=VALUE")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {pair!r}: the value is not YAML: {error}") from None
        number = number_of(value) if isinstance(value, str) else None  # YAML 1.1 takes 1e-3 for text
        found[name.replace("-", "_")] = value if number is None else number
    return found


def merged(file: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a YAML file, and over them those that were given: those that are not None."""
    options = dict[str, Any]()
    if file is not None:
        try:
            data = yaml.safe_load(file.read_text())
        except yaml.YAMLError as error:
            raise UsageError(f"{file} is not YAML: {error}") from None
        if not isinstance(data, Mapping):
            raise UsageError(
                f"{file} is of type {type(data).__name__}, expected options, one a line: max-new-tokens: 64"
            )
        options = {str(name).replace("-", "_"): value for name, value in data.items()}
    return options | {name: value for name, value in given.items() if value is not None}


def settings_of(options: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Take the settings of a call out of options, and refuse what is neither a setting nor `known` to the command."""
    known = set(known)
    settings = {name: value for name, value in options.items() if name not in known}
    rule = rule_of(options.get("rule"), settings)
    for name in settings:
        if name not in SETTINGS:
            near = _near(name, [*SETTINGS, *known])
            raise UsageError(
                f"unknown option {name.replace('_', '-')!r}{near or f', expected one of {sorted(known)} or a setting'}"
            )
    return settings if rule is None else {**settings, "rule": rule}


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0].replace('_', '-')!r}?" if near else ""
