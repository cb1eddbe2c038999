"""All attempts at an answer, as a report shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stars_kernels.report.source import Row, Run


def details_of(row: Row, run: Run, rejected: bool) -> dict[str, Any]:
    """Return the trace of an answer. rejected: with the texts of attempts that were not taken."""
    assert row.answer is not None
    widths = row.cost.get("widths") or []
    segments = [_segment(segment, run, rejected) for segment in row.answer["segments"]]
    for segment, of_rounds in zip(segments, widths, strict=False):
        if of_rounds:
            segment["widths"] = of_rounds
    seconds = {phase: shortened(value) for phase, value in row.cost.get("seconds", {}).items()}
    counts = {**row.answer["counts"], **row.cost.get("counts", {})}
    return {"segments": segments, "seconds": seconds, "counts": counts}


def _segment(segment: Mapping[str, Any], run: Run, rejected: bool) -> dict[str, Any]:
    """Return a segment: a list per column of its table, with an entry per judged attempt."""
    found: dict[str, Any] = {
        "outcome": segment["outcome"],
        "chosen": segment["chosen"],
        "rewards": [shortened(reward) for reward in segment["rewards"]],
        "lengths": segment["lengths"],
    }
    thresholds = [shortened(threshold) for threshold in segment["thresholds"]]
    if any(threshold != "nan" for threshold in thresholds):
        found["thresholds"] = thresholds
    if texts := segment.get("texts"):
        chosen = segment["chosen"]
        found["texts"] = texts if rejected else [text if i == chosen else None for i, text in enumerate(texts)]
    if tokens := segment.get("tokens"):
        found["ends"] = [i for i, some in enumerate(tokens) if some and some[-1] in run.eos]
    if segment.get("kept"):
        found["numbers"], found["turns"] = _race(segment, int(run.rule_settings["segment_size"]), run.eos)
        found["kept"] = segment["kept"]
    return found


def _race(segment: Mapping[str, Any], size: int, eos: frozenset[int]) -> tuple[list[int | None], list[int]]:
    """Return the number of the attempt that each entry is of, and its turn.

    In turn t an attempt grows from t * size tokens to at most (t + 1) * size. In a turn those grow that were kept at
    the border before it and have not ended. Where an attempt ended at a border, its tokens tell; without them the
    numbers of the turn behind that border may not be known: None.
    """
    lengths, tokens = segment["lengths"], segment.get("tokens")
    turns = [(length - 1) // size for length in lengths]
    last, numbers = dict[int, int](), list[int | None]()  # attempt -> its last entry
    for turn in range(max(turns) + 1):
        entries = [entry for entry, of in enumerate(turns) if of == turn]
        grown = [a for a in segment["kept"][turn - 1] if a in last and lengths[last[a]] == turn * size] if turn else []
        if tokens is not None:
            grown = [attempt for attempt in grown if tokens[last[attempt]][-1] not in eos]
        if turn == 0:
            grown = [*range(len(entries))]
        known = grown if len(grown) == len(entries) else [None] * len(entries)
        last |= {attempt: entry for attempt, entry in zip(known, entries, strict=True) if attempt is not None}
        numbers += known
    return numbers, turns


def shortened(value: Any) -> float | str:
    """Round a number to 7 digits, as no reader sees more; JSON has no NaN and no infinity, which become strings."""
    number = float(value)
    return float(f"{number:.7g}") if math.isfinite(number) else str(number)
