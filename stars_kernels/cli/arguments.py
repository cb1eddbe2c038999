"""What the words of a command line mean: rules and settings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from stars_kernels.decoder.naming import SETTINGS, near, rule_of


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
            found[name.replace("-", "_")] = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {pair!r}: the value is not YAML: {error}") from None
    return found


class _Loader(yaml.SafeLoader):
    """Reads YAML as `safe_load` does, but 1e-3 is a number, and a key that comes twice is refused."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {twice!r} is there twice, expected it once")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+"), [*"-+.0123456789"])


def merged(file: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a YAML file, and over them those that were given: those that are not None."""
    options = dict[str, Any]()
    if file is not None:
        try:
            data = yaml.load(file.read_text(encoding="utf-8"), _Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
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
            raise unknown_option(name, [*SETTINGS, *known], f"one of {sorted(known)} or a setting")
    return settings if rule is None else {**settings, "rule": rule}


def unknown_option(name: str, known: Iterable[str], expected: str) -> UsageError:
    """Return the error for an option that is not `known`; expected: is told where none of these is near."""
    name = name.replace("_", "-")
    hint = near(name, [other.replace("_", "-") for other in known]) or f", expected {expected}"
    return UsageError(f"unknown option {name!r}{hint}")
