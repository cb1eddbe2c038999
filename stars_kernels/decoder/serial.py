"""What a decode gives back as JSON's own types, and back again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

VERSION = 1
"""Of the form that `to_dict` gives."""

Kind = TypeVar("Kind")


def to_plain(value: Any) -> Any:
    """Return dicts, lists, strings, numbers and None in place of dataclasses and tuples.

    JSON has no NaN and no infinity: they become the strings "nan", "inf" and "-inf", which `float` reads.
    """
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def floats(values: Sequence[Any]) -> list[float]:
    """Read numbers that `to_plain` wrote."""
    return [float(value) for value in values]


def checked_version(data: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return `data` without its version, which must be known."""
    if not isinstance(data, Mapping) or data.get("version") != VERSION:
        found = data.get("version") if isinstance(data, Mapping) else type(data).__name__
        raise ValueError(f"{what} has version {found!r}, expected a dict of version {VERSION}, as to_dict() gives it")
    return {name: value for name, value in data.items() if name != "version"}


def rule_to_plain(rule: object) -> dict[str, Any] | None:
    """Return a rule's name and settings; of one that is no dataclass, how Python writes it."""
    if rule is None:
        return None
    settings = to_plain(rule) if dataclasses.is_dataclass(rule) else {"repr": repr(rule)}
    return {"name": type(rule).__name__, "settings": settings}


def rule_from_plain(data: Mapping[str, Any] | None, rules: Sequence[type[Kind]]) -> Kind | None:
    """Make the rule again, one of `rules`; its __post_init__ makes tuples of lists, where it has some."""
    if data is None:
        return None
    known = {rule.__name__: rule for rule in rules}
    if data["name"] not in known or not dataclasses.is_dataclass(known[data["name"]]):
        raise ValueError(
            f"the rule is {data['name']!r}, expected one of {', '.join(known)}; pass a rule of your own, a dataclass, "
            "as rules=[...]"
        )
    return known[data["name"]](**data["settings"])
