"""Pictures, as SVG whose text is text: reward against cost of each rule, and a calibration."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stars_kernels.data.journal import write_whole
from stars_kernels.decoder.calibration import accepted_share
from stars_kernels.decoder.output import Calibration
from stars_kernels.evaluation.figures import BASE, Figures
from stars_kernels.extras import require

INK, QUIET, ACCENT = "#222222", "#8a8a8a", "#1f5fa8"
"""Colours: of text and plain points, of what stands back, and of what the eye should find."""
STYLE = {
    "svg.hashsalt": "stars-kernels",  # ids in the file that are the same each time
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
}
PLACES = [
    (x, y, "left" if x > 0 else "right" if x < 0 else "center", "bottom" if y > 0 else "top" if y < 0 else "center")
    for x, y in (
        (9, 0), (-9, 0), (7, 6), (7, -6), (-7, 6), (-7, -6), (0, 10), (0, -10),
        (9, 16), (9, -16), (-9, 16), (-9, -16), (9, 28), (9, -28), (-9, 28), (-9, -28),
    )
]  # fmt: skip
"""Where a label may stand, the best first: its offset from the point in points, and its alignment."""
Cost = Literal["sampled", "seconds"]
COSTS: Mapping[Cost, str] = {"sampled": "sampled tokens per prompt", "seconds": "seconds per prompt"}


@contextmanager
def drawn(path: Path, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """Open a figure in the package's style as (figure, axes), and write it in one step: the same bytes each time.

    Args:
        size: in inches.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: it cannot be written; what was there stays.
    """
    matplotlib = require("matplotlib", "eval")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots()
        found = io.BytesIO()
        figure.savefig(found, format="svg", metadata={"Date": None, "Creator": None})
    write_whole(path, [found.getvalue()])


def plot_rewards(path: Path, rules: Sequence[Figures], cost: Cost, guided: Sequence[str] = ()) -> None:
    """Draw each rule's mean reward against what a prompt costs.

    A bar is the interval of a rule's gain over plain sampling, set at its reward.

    Args:
        cost: on the axis from left to right.
        guided: names of the rules that accept and reject, which are drawn in the accent's colour.
    """
    points = [one for one in rules if one.reward is not None and getattr(one, cost) is not None]
    with drawn(path, (7.2, 4.6)) as (figure, axes):
        for one in points:
            colour = ACCENT if one.rule in guided else INK
            x = getattr(one, cost)
            axes.plot([x, x], _bar(one), color=colour, linewidth=1.1, alpha=0.55, solid_capstyle="round", zorder=2)
            face = "white" if one.rule == BASE else colour
            axes.plot(x, _height(one), "o", markersize=6.5, color=colour, markerfacecolor=face, zorder=3)
        if points and all(getattr(one, cost) > 0 for one in points):
            axes.set_xscale("log")
            axes.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        axes.margins(0.14, 0.08)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel(COSTS[cost])
        axes.set_ylabel("mean reward")
        axes.set_title(f"Reward and {COSTS[cost].removesuffix(' per prompt')}, each rule; 95 % intervals of the gain")
        figure.draw_without_rendering()  # lays out, so that labels know where points are
        _label(axes, figure.canvas.get_renderer(), points, cost)


def _height(one: Figures) -> float:
    assert one.reward is not None
    return one.reward.mean


def _bar(one: Figures) -> tuple[float, float]:
    """Return the ends of a rule's bar, on the axis of rewards."""
    middle = _height(one)
    if one.gain is None or one.gain.low is None or one.gain.high is None:
        return middle, middle
    return middle + one.gain.low - one.gain.mean, middle + one.gain.high - one.gain.mean


def _label(axes: Any, renderer: Any, points: Sequence[Figures], cost: Cost) -> None:
    """Write each rule's name beside its point, where it covers least."""
    from matplotlib.transforms import Bbox

    taken = []
    for one in points:
        x = getattr(one, cost)
        (left, low), (_, high) = axes.transData.transform([(x, end) for end in _bar(one)])
        _, middle = axes.transData.transform((x, _height(one)))
        taken += [Bbox([[left - 1, low], [left + 1, high]]), Bbox([[left - 5, middle - 5], [left + 5, middle + 5]])]
    for one in points:
        places = list[tuple[int, int, Any, Any]]()
        for dx, dy, horizontal, vertical in PLACES:
            text = axes.annotate(
                one.rule, (getattr(one, cost), _height(one)), (dx, dy), textcoords="offset points",
                ha=horizontal, va=vertical, fontsize=9, color=INK,
            )  # fmt: skip
            text.set_in_layout(False)
            box = text.get_window_extent(renderer)
            outside = not all(axes.bbox.contains(*corner) for corner in (box.min, box.max))
            places.append((sum(map(box.overlaps, taken)) + 3 * outside, len(places), text, box))
        _, _, best, box = min(places, key=lambda place: place[:2])
        for *_, text, _ in places:
            if text is not best:
                text.remove()
        taken.append(box)


def plot_calibration(path: Path, calibration: Calibration) -> None:
    """Draw the rewards of plain continuations, r*, and with which probability a reward is accepted at r*."""
    rewards, target, beta = calibration.rewards, calibration.reward_threshold, calibration.beta
    share = accepted_share(rewards, target, beta)
    with drawn(path, (7.2, 4.2)) as (_, axes):
        axes.hist(rewards, bins=min(30, max(5, len(rewards) // 4)), color="#cfd6de", edgecolor="white")
        axes.set_xlabel("reward of a plain continuation")
        axes.set_ylabel("continuations")
        axes.margins(x=0.08)
        chance = axes.twinx()
        low, high = axes.get_xlim()
        low, high = min(low, target - 0.05 * (high - low)), max(high, target + 0.05 * (high - low))
        x = np.linspace(low, high, 400)
        y = np.exp(np.minimum(0.0, (x - target) / beta))
        chance.plot(x, y, color=ACCENT, linewidth=1.8)
        chance.axvline(target, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
        chance.annotate(f"r* = {target:.4g}", (target, 1.09), (-5, 0), textcoords="offset points", ha="right", va="top")
        chance.set_xlim(low, high)
        chance.set_ylim(0, 1.1)
        chance.set_ylabel("probability of acceptance at r*", color=ACCENT)
        chance.tick_params(axis="y", colors=ACCENT)
        chance.spines["right"].set_visible(True)
        axes.set_title(
            f"{len(rewards)} plain continuations, beta = {beta:.4g}: {share:.0%} are expected to be accepted"
        )
