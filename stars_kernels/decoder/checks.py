"""Checks of settings: each names the value found and what was expected."""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Callable
from decimal import Decimal
from typing import Any

SEED_BITS = 4096
"""Of the largest seed or request id: it is hashed as decimal digits, of which Python writes a few thousand at most."""


def check(settings: object, name: str, valid: bool, expected: str) -> None:
    """Raise ValueError where a field of `settings` is not valid."""
    if not valid:
        raise ValueError(f"{name} is {shown(getattr(settings, name))}, expected {expected}")


def check_count(settings: object, name: str, below: int | None = None) -> None:
    """Check a field that is an integer >= 1 and < `below`; any library's integer becomes Python's own."""
    value = plain(getattr(settings, name))
    check(settings, name, is_int(value) and value >= 1, "an integer >= 1")
    check(settings, name, below is None or value < below, f"less than {below}")
    object.__setattr__(settings, name, value)


def check_count_or_none(name: str, count: Any) -> None:
    """Refuse what is neither an integer >= 1 nor None."""
    if count is not None and not (is_int(count) and count >= 1):
        raise ValueError(f"{name} is {count!r}, expected 1 or more, or None")


def check_number(
    settings: object, name: str, valid: Callable[[float], bool], expected: str, optional: bool = False
) -> None:
    """Check a field that is a number, and make it a float; None stays where it is admitted."""
    value = getattr(settings, name)
    if value is None and optional:
        return
    number = finite(value)
    check(settings, name, number is not None and valid(number), expected)
    object.__setattr__(settings, name, number)


def plain(value: Any) -> Any:
    """Return any library's integer as Python's own; all else as it is."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def finite(value: object) -> float | None:
    """Return a number of any kind and library as a float; None where it is no number, or no finite float holds it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real | Decimal):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):  # an integer or a fraction that is too large; a signalling NaN
        return None
    return number if math.isfinite(number) else None


class _Shown(reprlib.Repr):
    """`repr` cut to a line: Python refuses to write an integer of many thousand digits."""

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() <= SEED_BITS else f"<an integer of {x.bit_length()} bits>"


shown = _Shown().repr
"""Write a value that was found, for an error message."""
