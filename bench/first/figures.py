"""A figure is one measured number beside the roofline's; a report is all of them, as JSON and as a Markdown table."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.first.clock import Timing

SAME = ("device", "gpu", "models", "dtype", "torch", "commit")
"""Facts that the figures of one report share."""
SCALES = {"s": 1.0, "ms": 1e3, "us": 1e6}


@dataclass(frozen=True)
class Figure:
    """`low` and `high` are of the repeats; None where there was one, or where they are not of this number."""

    name: str
    value: float
    unit: str
    roofline: float | None = None
    """What the roofline says, in the same unit; None where it says nothing."""
    note: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def share(self) -> float | None:
        """Of the roofline's speed that was reached: 1 = as it says, below 1 = slower."""
        if self.roofline is None or not self.value or not self.roofline:
            return None
        return self.roofline / self.value if self.unit in SCALES else self.value / self.roofline


def duration(name: str, timing: Timing, unit: str, roofline: float | None = None, note: str = "") -> Figure:
    """Return a time's figure; `timing` and `roofline` are in seconds, `unit` is s, ms or us."""
    scale = SCALES[unit]
    expected = None if roofline is None else roofline * scale
    return Figure(name, timing.median * scale, unit, expected, note, timing.low * scale, timing.high * scale)


def rate(name: str, amount: float, timing: Timing, unit: str, roofline: float | None = None, note: str = "") -> Figure:
    """Return a rate's figure: `amount` a second, in the unit's own scale, as `roofline` is."""
    return Figure(name, amount / timing.median, unit, roofline, note, amount / timing.high, amount / timing.low)


@dataclass
class Report:
    """What a run has found so far; `save` writes it, so that a run that is killed keeps it."""

    folder: Path
    facts: dict[str, Any]
    """Machine and setting."""
    figures: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    """Each with part, error and traceback."""
    not_reached: dict[str, str] = field(default_factory=dict)
    """Part: why it has no figures, or not all."""
    seconds: dict[str, float] = field(default_factory=dict)
    """That each part took."""
    done: list[str] = field(default_factory=list)
    """Parts that have ended, with all their figures or with a failure."""
    rates: dict[str, float] = field(default_factory=dict)
    """Measured here: `copy` bytes and `gemm` operations a second, at best."""

    @property
    def json_file(self) -> Path:
        return self.folder / "first.json"

    def add(self, part: str, figure: Figure) -> None:
        self.figures.append({"part": part, **asdict(figure), "share": figure.share})

    def save(self) -> None:
        content = asdict(self) | {"complete": not self.failures and not self.not_reached}
        del content["folder"]
        _replace(self.json_file, json.dumps(content, indent=2) + "\n")
        _replace(self.folder / "first.md", self.markdown())

    def restore(self) -> None:
        """Take from the folder what an earlier run has ended there, and nothing of parts that it has not.

        Raises:
            ValueError: there is none, or it was of another device or other models.
        """
        if not self.json_file.exists():
            raise ValueError(f"{self.json_file} is missing, expected what an earlier run has left there")
        content = json.loads(self.json_file.read_text())
        for name in SAME:
            found, expected = content["facts"].get(name), self.facts.get(name)
            if found != expected:
                raise ValueError(f"{self.json_file} has {name} {found!r}, expected {expected!r}, as in this run")
        for name in ("failures", "done", "rates"):
            setattr(self, name, content[name])
        self.figures = [figure for figure in content["figures"] if figure["part"] in self.done]
        self.seconds = {part: content["seconds"][part] for part in self.done}

    def markdown(self) -> str:
        lines = ["# First figures", "", *(f"- {name}: {value}" for name, value in self.facts.items()), ""]
        lines += ["| figure | value | unit | roofline | share | note |", "|---|---|---|---|---|---|"]
        for f in self.figures:
            cells = (f["name"], number(f["value"]), f["unit"], number(f["roofline"]), percent(f["share"]), f["note"])
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
        lines += ["", "share: of the roofline's speed that was reached; 100 % = as it says. 64 x 3: prompts x attempts "
                  "of each side by side.", ""]  # fmt: skip
        if self.failures:
            lines += ["## Failed", "", *(f"- {f['part']}: {f['error'].splitlines()[0]}" for f in self.failures), ""]
        if self.not_reached:
            lines += ["## Not reached", "", *(f"- {part}: {why}" for part, why in self.not_reached.items()), ""]
        return "\n".join(lines)


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _replace(path: Path, text: str) -> None:
    """Write the whole file or nothing."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(text)
    os.replace(draft, path)
