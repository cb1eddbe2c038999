"""Rules and settings by the names that a command line and a server's requests have for them."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable
from typing import Any

from stars_kernels.decoder.config import RULE_SETTINGS, StarsConfig
from stars_kernels.decoder.rules import RULES, Rule

SETTINGS = tuple(field.name for field in dataclasses.fields(StarsConfig) if field.name != "rule")


def rule_names() -> dict[str, type[Any]]:
    """Return the rules by name: `BestOf` is "best-of"."""
    return {re.sub(r"(?<!^)(?=[A-Z])", "-", rule.__name__).lower(): rule for rule in RULES}


def rule_of(name: object, settings: dict[str, Any], what: str = "rule") -> Rule | None:
    """Make the rule of this name, and take its settings out of `settings`.

    None, as a name and as the rule, is STARS, whose settings are `StarsConfig`'s. what: has the name, for the errors.

    Raises ValueError where there is no such rule, or one of its settings is missing or wrong.
    """
    names = rule_names()
    if name is None or name == "stars":
        return None
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"{what} is {name!r}, expected one of {', '.join(names)}{near(str(name), names)}")
    kind = names[name]
    own = {field.name: field.default for field in dataclasses.fields(kind)}
    given = {
        key: settings.pop(key) for key in [*settings] if key in own and (key in RULE_SETTINGS or key not in SETTINGS)
    }
    missing = [key for key, default in own.items() if default is dataclasses.MISSING and key not in given]
    if missing:
        raise ValueError(f"{what} is {name!r} without {missing[0]}, expected a value for it")
    made: Rule = kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})
    return made


def near(name: str, names: Iterable[str]) -> str:
    """Return a hint at the one of `names` that was perhaps meant; empty where none is near."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
