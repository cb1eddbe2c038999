"""Rows of a benchmark, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


class CheckError(Exception):
    """Contestants that must agree do not: nothing is timed."""


@dataclass
class Row:
    """One comparison. Seconds are for the same unit of work on both sides; `note` says which."""

    name: str
    against: str
    ratio: float
    """How many times faster ours is: above 1 is faster."""
    target: float | None
    floor: float | None
    """Our time over the time this machine's memory and arithmetic allow at best."""
    ours_seconds: float
    against_seconds: float
    note: str = ""

    @property
    def missed(self) -> bool:
        return self.target is not None and self.ratio < self.target


def table(rows: Sequence[Row]) -> str:
    lines = [("job", "against", "ratio", "target", "over floor", "ours s", "theirs s", "note")]
    for row in rows:
        target = "" if row.target is None else f"{row.target:g}x"
        floor = "" if row.floor is None else f"{row.floor:.1f}x"
        seconds = (f"{row.ours_seconds:.3g}", f"{row.against_seconds:.3g}")
        lines.append((row.name, row.against, f"{row.ratio:.2f}x", target, floor, *seconds, row.note))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in text)


def missed_targets(rows: Sequence[Row]) -> list[str]:
    return [
        f"MISSED: {row.name} against {row.against}: {row.ratio:.2f}x, target {row.target:g}x"
        for row in rows
        if row.missed
    ]


def write_json(path: Path, machine: dict[str, Any], rows: Sequence[Row]) -> None:
    path.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
