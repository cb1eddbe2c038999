"""How `roofline` prints what it finds: indented tables of text, which are blocks of code in a document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.variants import Band


def cell(value: Any) -> str:
    """A number to three digits; a band as `middle (low-high)`."""
    if isinstance(value, Band):
        return f"{cell(value.middle)} ({cell(value.low)}-{cell(value.high)})"
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "    (nothing fits)"
    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ("  ".join(entry.ljust(width) for entry, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(f"    {line}".rstrip() for line in text)


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
