"""What the words of a command line mean: rules and settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from stars_kernels.hf.by_name import SETTINGS, near_one, number_of, rule_of


class UsageError(ValueError):
    """What a command was given cannot be meant."""


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
            near = near_one(name, [*SETTINGS, *known])
            raise UsageError(
                f"unknown option {name.replace('_', '-')!r}{near or f', expected one of {sorted(known)} or a setting'}"
            )
    return settings if rule is None else {**settings, "rule": rule}
