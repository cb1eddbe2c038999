"""A comparison as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from textwrap import fill

from stars_kernels.evaluation.figures import Figures
from stars_kernels.evaluation.statistics import METHOD, Estimate

COLUMNS = (
    "rule", "answers", "errors", "paired", "left_out", "reward", "reward_low", "reward_high", "gain", "gain_low",
    "gain_high", "wins", "ties", "losses", "unreadable", "failed", "win_rate", "win_rate_low", "win_rate_high",
    "length_controlled", "not_longer", "win_rate_not_longer", "flip_rate", "length", "judged", "sampled", "rm_scored",
    "waste_per_rejection", "acceptance_rate", "seconds", "tokens_per_second",
)  # fmt: skip
"""Of the CSV file; `Figures` and `AgainstPlain` explain them. Those of time stand last."""
OF_TIME = ("seconds", "tokens_per_second")


def flat(one: Figures) -> dict[str, object]:
    """Return a rule's figures by the columns' names; None where there is none."""
    found: dict[str, object] = {}
    for name, value in {**vars(one), **({} if one.against_plain is None else vars(one.against_plain))}.items():
        if isinstance(value, Estimate):
            found |= {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}
        else:
            found[name] = value
    return {name: found.get(name) for name in COLUMNS}


def to_csv(rules: Sequence[Figures]) -> str:
    """Return a table with a line per rule; a cell without a figure is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for one in rules:
        cells = flat(one)
        writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in cells.items()})
    return text.getvalue()


def to_markdown(rules: Sequence[Figures], facts: Sequence[str], settings: Mapping[str, str]) -> str:
    """Return the tables, what they mean, and the settings.

    Args:
        facts: sentences on the models, the prompts and the judge.
        settings: of each rule, as text.
    """
    judged = [one for one in rules if one.against_plain is not None]
    parts = [
        "# Decoding rules compared",
        _filled(" ".join(facts)),
        "## Answers",
        _table(_answers(rules)),
        _filled(ANSWERS_TOLD),
    ]
    if judged:
        parts += ["## Against plain sampling", _table(_against(judged)), _filled(AGAINST_TOLD)]
    parts += ["## Cost of a prompt", _table(_costs(rules)), _filled(COSTS_TOLD)]
    parts += [f"![Mean reward of each rule against {what}]({file})" for what, file in PICTURES.items()]
    parts += ["## Settings", "\n".join(f"- {name}: `{text}`" for name, text in settings.items())]
    return "\n\n".join(parts) + "\n"


PICTURES = {"sampled tokens": "reward_tokens.svg", "seconds": "reward_seconds.svg"}
"""Beside the tables, by what a reward stands against."""
ANSWERS_TOLD = f"""\
In brackets: {METHOD}. The gain is the mean difference from plain sampling's reward on the same prompt, over the prompts
that both have answered (paired). Prompts that failed, or have no answer yet, under a rule or under plain sampling are
left out of that rule's gain. Length: tokens of an answer."""
AGAINST_TOLD = """\
Each answer against plain sampling's to the same prompt. The win rate counts a tie as half a win; its interval is as
above. A judge of pairs is asked in both orders: where these disagree, it is a tie, and counts in the flip rate. Equal
texts are a tie that is not asked about. Longer answers are often preferred for their length alone, so there are two
more win rates: of the answers that are not longer than plain sampling's, and the one that a logistic regression of
the wins on the difference of lengths expects at equal lengths. Unreadable and failed verdicts count nowhere else."""
COSTS_TOLD = """\
Means over a rule's answers. Judged tokens are those of the attempts that were judged, as a loop by hand would have
sampled them; sampled tokens are those of all rows, those beyond included; reward-model tokens are those that it read,
the prompt included (0 for a function). Waste: tokens of a rejected attempt. Accepted: share of the attempts, for rules
with a test. Seconds: wall time, shared among the prompts that were decoded side by side; loading and calibration are
not in it. Bars in the pictures: the intervals of the gain."""


def _answers(rules: Sequence[Figures]) -> list[list[str]]:
    rows = [["rule", "reward", "gain", "length", "answers", "paired", "left out", "errors"]]
    for one in rules:
        counts = [one.answers, one.paired, one.left_out, one.errors]
        rows.append([one.rule, told(one.reward), told(one.gain, "+"), number(one.length, ".0f"), *map(str, counts)])
    return rows


def _against(rules: Sequence[Figures]) -> list[list[str]]:
    rows = [["rule", "win / tie / loss", "win rate", "not longer", "at equal length", "flips", "unreadable", "failed"]]
    for one in rules:
        assert one.against_plain is not None
        against = one.against_plain
        not_longer = f"{number(against.win_rate_not_longer, '.0%') or 'none'} of {against.not_longer}"
        rows.append(
            [
                one.rule, f"{against.wins} / {against.ties} / {against.losses}", told(against.win_rate, kind=".1%"),
                not_longer, number(against.length_controlled, ".1%") or "not enough pairs",
                number(against.flip_rate, ".0%"), str(against.unreadable), str(against.failed),
            ]
        )  # fmt: skip
    return rows


def _costs(rules: Sequence[Figures]) -> list[list[str]]:
    rows = [["rule", "judged", "sampled", "reward-model tokens", "waste", "accepted", "seconds", "tokens/s"]]
    for one in rules:
        tokens = [number(value, ".0f") for value in (one.judged, one.sampled, one.rm_scored)]
        waste, accepted = number(one.waste_per_rejection, ".1f"), number(one.acceptance_rate, ".0%")
        time = [number(one.seconds, ".3g"), number(one.tokens_per_second, ".3g")]
        rows.append([one.rule, *tokens, waste, accepted, *time])
    return rows


def told(one: Estimate | None, sign: str = "", kind: str = ".3f") -> str:
    """Return a mean and its interval as text: 0.871 (0.742 to 0.969); empty where there is none."""
    if one is None:
        return ""
    mean, low, high = (number(value, sign + kind) for value in (one.mean, one.low, one.high))
    return f"{mean} ({low} to {high})" if low else mean


def number(value: float | None, kind: str) -> str:
    """Return a number as text; empty where there is none."""
    return "" if value is None else format(value, kind)


def _filled(text: str) -> str:
    return fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ("| " + " | ".join(cells) + " |" for cells in rows)
    return "\n".join([head, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body])
