"""Types of command line arguments, so that argparse refuses a bad value before anything is loaded."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """Make the type of a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        number = int(text) if text.removeprefix("-").isdecimal() else None
        if number is None or number < low or (high is not None and number > high):
            expected = f"a whole number >= {low}" if high is None else f"a whole number from {low} to {high}"
            raise ArgumentTypeError(f"it is {text!r}, expected {expected}")
        return number

    return parse


def share(text: str) -> float:
    """Read a number above 0, up to 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1:  # NaN neither
        raise ArgumentTypeError(f"it is {text!r}, expected a number above 0, up to 1")
    return number


def output_file(text: str) -> Path:
    """Read the name of a file to be written, whose folder exists."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise ArgumentTypeError(f"it is {text!r}, expected a file in a folder that exists")
    return path


def output_folder(text: str) -> Path:
    """Read the name of a folder, which will be made where it is missing."""
    path = Path(text)
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise ArgumentTypeError(f"it is {text!r}, expected a folder or a place for one; {existing} is a file")
    return path
