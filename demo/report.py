"""The report of `python -m demo.compare`: means with intervals, a table, a plot and the document that holds them."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import torch

from stars_kernels import Calibration
from stars_kernels.decoder.rules import Rule

Line = dict[str, Any]
"""What is recorded of one rule's answer to one prompt."""
BASE = "plain"
"""The rule over which gains are told."""
MARKERS = {
    "plain": "o",
    "best-of": "o",
    "block": "s",
    "adasearch": "D",
    "speculative": "P",
    "cards": "v",
    "args": "X",
    "stars": "*",
}
"""Of rules whose names begin so."""
PLACES = [
    (x, y, "left" if x > 0 else "right" if x < 0 else "center", "bottom" if y > 0 else "top" if y < 0 else "center")
    for x, y in ((8, 0), (-8, 0), (6, 5), (6, -5), (-6, 5), (-6, -5), (0, 9), (0, -9), (8, 14), (8, -14), (-8, 14))
]
"""Where a label may stand, the best first: its offset from the point, and its alignment."""
BEGIN, END = "<!-- reading: by hand, kept by --write -->", "<!-- end of reading -->"


class Gain(NamedTuple):
    """A mean difference between paired answers, and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


class Row(NamedTuple):
    """A rule's means over the prompts, and its gains over plain sampling; plain sampling has none."""

    rule: str
    reward: float
    reward_gain: Gain | None
    vader: float
    vader_gain: Gain | None
    sampled: float
    rm_scored: float
    seconds: float


def interval(gains: torch.Tensor, draws: int = 10_000) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of `gains` [prompts]."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(gains), (draws, len(gains)), generator=generator)
    low, high = gains[picks].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=gains.dtype)).tolist()
    return low, high


def rows(answers: Mapping[str, list[Line]]) -> list[Row]:
    """Return a row for each rule; `answers` has each rule's lines, of the same prompts in the same order."""

    def values(rule: str, what: str) -> torch.Tensor:
        return torch.tensor([line[what] for line in answers[rule]], dtype=torch.float64)

    def mean(rule: str, what: str) -> float:
        return values(rule, what).mean().item()

    def gain(rule: str, what: str) -> Gain | None:
        if rule == BASE:
            return None
        gains = values(rule, what) - values(BASE, what)
        return Gain(gains.mean().item(), *interval(gains))

    return [
        Row(
            rule,
            mean(rule, "reward"),
            gain(rule, "reward"),
            mean(rule, "vader"),
            gain(rule, "vader"),
            *(mean(rule, what) for what in ("sampled", "rm_scored", "seconds")),
        )
        for rule in answers
    ]


def table(found: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    heads = ("rule", "reward", "gain (95 %)", "VADER", "gain (95 %)")
    heads += ("sampled tokens", "reward-model tokens", "seconds")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in found:
        cells = [row.rule, f"{row.reward:.3f}", str(row.reward_gain or ""), f"{row.vader:.3f}"]
        cells += [str(row.vader_gain or ""), f"{row.sampled:.0f}", f"{row.rm_scored:.0f}", f"{row.seconds:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(file: Path, found: list[Row]) -> None:
    """Draw reward against sampled tokens and against seconds, as an SVG whose text is text."""
    from matplotlib import rc_context  # not needed for the table
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = {"svg.hashsalt": "stars-kernels", "svg.fonttype": "none", "font.size": 9, "lines.linewidth": 0.8}
    with rc_context(settings):
        figure = Figure(figsize=(11, 5.5), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        panels = list(zip(figure.subplots(1, 2, sharey=True), ("sampled", "seconds"), strict=True))
        for axes, what in panels:
            draw(axes, found, what)
        panels[0][0].set_ylabel("mean reward")
        figure.draw_without_rendering()  # lays out, so that labels know where points are
        for axes, what in panels:
            label(axes, canvas.get_renderer(), found, what)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def bar(row: Row) -> tuple[float, float]:
    """Return the ends of a row's interval: that of its gain, on the axis of rewards."""
    if row.reward_gain is None:
        return row.reward, row.reward
    base = row.reward - row.reward_gain.mean
    return base + row.reward_gain.low, base + row.reward_gain.high


def draw(axes: Any, found: list[Row], what: str) -> None:
    """Draw a point and an interval for each row, and a line through the numbers of best-of-N."""
    curve = [row for row in found if row.rule == BASE or row.rule.startswith("best-of")]
    axes.plot([getattr(row, what) for row in curve], [row.reward for row in curve], color="0.7", zorder=1)
    for row in found:
        x = getattr(row, what)
        marker = next(marker for name, marker in MARKERS.items() if row.rule.startswith(name))
        axes.plot([x, x], bar(row), color="0.45", zorder=2)
        hollow = row.rule in (BASE, "stars-hard")
        axes.plot(x, row.reward, marker, color="black", markerfacecolor="white" if hollow else "black", zorder=3)
    axes.set_xscale("log")
    axes.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.margins(0.12, 0.06)
    axes.set_xlabel({"sampled": "sampled tokens per prompt", "seconds": "seconds per prompt"}[what])
    axes.spines[["top", "right"]].set_visible(False)


def label(axes: Any, renderer: Any, found: list[Row], what: str) -> None:
    """Write each rule's name beside its point, where it covers least."""
    from matplotlib.transforms import Bbox

    points = {row.rule: (getattr(row, what), row) for row in found}
    taken = []
    for x, row in points.values():
        (left, low), (_, high) = axes.transData.transform([(x, end) for end in bar(row)])
        _, middle = axes.transData.transform((x, row.reward))
        taken += [Bbox([[left - 1, low], [left + 1, high]]), Bbox([[left - 4, middle - 4], [left + 4, middle + 4]])]
    for x, row in points.values():
        places = []
        for dx, dy, horizontal, vertical in PLACES:
            text = axes.annotate(
                row.rule, (x, row.reward), (dx, dy), textcoords="offset points", ha=horizontal, va=vertical, fontsize=8
            )
            text.set_in_layout(False)
            box = text.get_window_extent(renderer)
            outside = not all(axes.bbox.contains(*corner) for corner in (box.min, box.max))
            places.append((sum(map(box.overlaps, taken)) + 3 * outside, len(places), text, box))
        _, _, best, box = min(places)
        for *_, text, _ in places:
            if text is not best:
                text.remove()
        taken.append(box)


def write(
    file: Path,
    found: list[Row],
    rules: Mapping[str, Rule],
    run: Mapping[str, Any],
    calibration: Calibration,
    prompts: int,
    command: str,
) -> None:
    """Write the document, and the plot beside it; the part that was written by hand stays."""
    picture, settings = file.with_suffix(".svg"), run["settings"]
    reading = reading_of(file)
    plot(picture, found)
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    what = (
        f"SmolLM2-135M-Instruct with the demo's sentiment reward (`--reward {settings['reward']}`) on {prompts} "
        f"prompts that the reward model was not trained on, answers of at most {settings['tokens']} tokens, seed "
        f"{settings['seed']}. All rules decode on one engine, in float32 on a {settings['machine']}; {run['date']}, "
        f"{versions}."
    )
    means = (
        "All figures are means over the prompts. The gain is the mean difference from plain sampling's answer to the "
        "same prompt, with its 95 % bootstrap interval over prompts. VADER's compound score is what the reward model "
        "imitates; no rule sees it. Sampled tokens are those of all rows, past a candidate's end too; reward-model "
        "tokens are those that it read, the prompt included. Seconds are wall time of calls of 8 prompts, after a call "
        "to warm up, divided by the prompts."
    )
    target = (
        f"r\\* = {calibration.reward_threshold:.3f} and beta = {calibration.beta:.3f} come from one calibration, on "
        f"{len(calibration.rewards)} plain answers to prompts that the reward model was trained on. The rules:"
    )
    parts = [
        "# Decoding rules compared",
        f"    {command}",
        *(fill(text, 120, break_on_hyphens=False) for text in (what, means)),
        table(found),
        f"![Mean reward against sampled tokens, and against seconds, of each rule]({picture.name})",
        fill(
            "Bars are the intervals of the gain, so plain sampling has none; the line joins plain sampling and "
            "best-of-N.",
            120,
        ),
        f"## Reading\n\n{BEGIN}\n{reading}\n{END}",
        "## Settings",
        fill(target, 120, break_on_hyphens=False),
        "\n".join(f"- {name}: `{rule}`" for name, rule in rules.items()),
    ]
    file.write_text("\n\n".join(parts) + "\n")


def reading_of(file: Path) -> str:
    """Return the part of the document that was written by hand."""
    if not file.exists():
        return ""
    _, begin, rest = file.read_text().partition(f"{BEGIN}\n")
    reading, end, _ = rest.partition(f"\n{END}")
    if not (begin and end):
        raise SystemExit(f"{file} has no part from {BEGIN!r} to {END!r}, expected one to keep: write to another file")
    return reading
