"""One HTML file that shows a run, or two side by side: it loads nothing, and runs no script but its own.

The page holds its data as JSON in two script elements that no browser executes: what the overview needs, and a line per
prompt with all attempts, which is read once that prompt is opened. The script in `template/` builds all elements from
them, and sets texts as texts: nothing of a prompt or an answer is ever read as HTML.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from transformers import PreTrainedTokenizerBase

from stars_kernels.data.journal import write_whole
from stars_kernels.report import figures
from stars_kernels.report.attempts import details_of, shortened
from stars_kernels.report.source import Row, Run, read_runs, with_texts

TEMPLATE = Path(__file__).parent / "template"
SCRIPTS = ("elements", "charts", "overview", "grid", "prompt", "routes")
"""Files of the page's script, in the order in which they are joined."""
MB = 1_000_000
ESCAPED = re.compile("[<>&\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
"""What stands in the file as an escape: ends of scripts, what no UTF-8 has, and what would hide or turn text around."""
LEFT_OUT = (
    "the texts of rejected attempts are left out",
    "the texts of rejected attempts are left out, and all attempts",
)
"""What a page that would be too large goes without, step by step."""


def write_report(
    source: Path | str,
    target: Path | str,
    beside: Path | str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_mb: float = 20.0,
) -> Path:
    """Write a page that shows what a run did: its figures, its prompts, and every attempt at every segment.

    Args:
        source: a folder of `run_file`, one of `stars compare` (its first two rules are shown), or a file with outputs
            of `StarsOutput.to_dict`: one, a list, or one a line.
        target: the HTML file.
        beside: another run to be shown side by side with the first one, prompt by prompt.
        tokenizer: the language model's, where the source has tokens of attempts but no texts.
        max_mb: what the page may weigh, in 10**6 bytes. Texts of rejected attempts are left out where it would be more,
            of the last prompts first, then their attempts; the page says so.

    Returns:
        The file that was written.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the source is no run, or the page cannot be as small as max_mb.
    """
    if not max_mb > 0:
        raise ValueError(f"max_mb is {max_mb!r}, expected a number > 0")
    target = Path(target)
    if target.is_dir():
        raise ValueError(f"{target} is a folder, expected a file to write the page to")
    runs = read_runs(Path(source))
    if beside is not None:
        others = read_runs(Path(beside))
        for path, found in ((source, runs), (beside, others)):
            if len(found) > 1:
                raise ValueError(f"{path} has several runs, expected one beside another: as {path}/rules/NAME")
        runs += others
    if tokenizer is not None:
        runs = [with_texts(run, tokenizer) for run in runs]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, [page_of(runs, max_mb)])
    return target


def page_of(runs: Sequence[Run], max_mb: float) -> bytes:
    """Return the page of one run, or of two side by side."""
    matched = _matched(runs)
    overview = _overview(runs, matched)
    page = _assembled(overview, [])
    room = round(max_mb * MB) - len(page) - 500  # a note
    details, note = _fitted(matched, runs, room, max_mb)
    overview["notes"] += [note] if note else []
    return _assembled(overview, details)


def to_script(data: Any) -> str:
    """Return JSON that may stand in a script element, on one line: whatever it holds, the element ends behind it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _assembled(overview: dict[str, Any], details: Sequence[str]) -> bytes:
    style = (TEMPLATE / "page.css").read_text(encoding="utf-8")
    script = "\n".join((TEMPLATE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "overview": to_script(overview),
        "details": "\n".join(details),
    }
    template = (TEMPLATE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template).encode()


def _hash(text: str) -> str:
    """Return the hash by which the page's Content-Security-Policy admits a style or a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _matched(runs: Sequence[Run]) -> list[list[Row | None]]:
    """Return the rows of one prompt side by side, one per run, None where a run has none; in the first run's order."""
    by_id: list[dict[tuple[int | str, int], Row]] = [_numbered(run.rows) for run in runs]
    ids = dict.fromkeys(row_id for rows in by_id for row_id in rows)
    return [[rows.get(row_id) for rows in by_id] for row_id in ids]


def _numbered(rows: Sequence[Row]) -> dict[tuple[int | str, int], Row]:
    """Return rows by their id and how many of the same id came before: outputs of several calls may share some."""
    found, seen = dict[tuple[int | str, int], Row](), dict[int | str, int]()
    for row in rows:
        seen[row.id] = seen.get(row.id, -1) + 1
        found[row.id, seen[row.id]] = row
    return found


def _overview(runs: Sequence[Run], matched: Sequence[Sequence[Row | None]]) -> dict[str, Any]:
    """Return what the page needs before a prompt is opened."""
    digits, keys = figures.reward_digits(runs), set[str]()
    return {
        "digits": digits,
        "names": _names(runs),
        "notes": [note for run in runs for note in run.notes] + _missing_texts(runs),
        "runs": [_of_run(run, digits) for run in runs],
        "rows": [_of_row(rows, keys) for rows in matched],
    }


def _names(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [f"{name} ({place})" for place, name in enumerate(names, 1)]


def _missing_texts(runs: Sequence[Run]) -> list[str]:
    """Say how the texts of attempts would be here, where they are not."""
    found = [segment for run in runs for row in run.rows if row.answer for segment in row.answer["segments"]]
    if any("texts" not in segment and segment.get("tokens") is not None for segment in found):
        return ["Some attempts are here as tokens alone: --tokenizer NAME, the language model's, turns them into text."]
    if any("texts" not in segment for segment in found):
        return ["The attempts' texts were not kept. A run with --set trace=full keeps them, and they are shown here."]
    return []


def _of_run(run: Run, digits: int) -> dict[str, Any]:
    settings = run.rule_settings
    return {
        "headline": figures.headline(run),
        "target": _optional(settings.get("reward_threshold")),
        "beta": _optional(settings.get("beta")),
        "hard": settings.get("accept") == "hard",
        "cards": figures.cards(run, digits),
        "facts": figures.facts(run),
        "phases": {phase: shortened(seconds) for phase, seconds in figures.phases(run).items()},
        "calibration": [] if run.calibration is None else [shortened(reward) for reward in run.calibration["rewards"]],
    }


def _optional(value: Any) -> float | str | None:
    return None if value is None else shortened(value)


def _of_row(rows: Sequence[Row | None], keys: set[str]) -> dict[str, Any]:
    """Return a prompt as the overview has it. keys: those of the prompts before; its own is added."""
    there = [row for row in rows if row is not None]
    prompt = next((row.prompt for row in there if row.prompt is not None), None)
    sides = [None if row is None else _of_side(row, prompt) for row in rows]
    return {"key": _key(there[0].id, keys), "id": there[0].id, "prompt": prompt, "sides": sides}


def _key(row_id: int | str, keys: set[str]) -> str:
    """Return what stands for a row in an address: ASCII, and no other row's."""
    plain = key = quote(str(row_id), safe="", errors="surrogatepass")
    number = 1
    while key in keys:
        number += 1
        key = f"{plain}~{number}"
    keys.add(key)
    return key


def _of_side(row: Row, prompt: Any) -> dict[str, Any]:
    other = {"prompt": row.prompt} if row.prompt is not None and row.prompt != prompt else {}
    if row.answer is None:
        return {"error": row.error or "it failed", **other}
    answer = row.answer
    return {
        "text": answer["text"],
        "reward": shortened(answer["reward"]),
        "empty": shortened(answer["prompt_reward"]),
        "finish": answer["finish_reason"],
        "tokens": len(answer["token_ids"]),
        "attempts": answer["counts"]["attempts"],
        "rejected": answer["counts"]["rejected"],
        "outcomes": "".join(segment["outcome"][0] for segment in answer["segments"]),  # a, f, b or u
        "tries": [len(segment["rewards"]) for segment in answer["segments"]],
        **other,
    }


def _fitted(
    matched: Sequence[Sequence[Row | None]], runs: Sequence[Run], room: int, max_mb: float
) -> tuple[list[str], str | None]:
    """Return a line of details per prompt, together at most `room` bytes, and a note on what that took."""
    fuller = _lines(matched, runs, 0)
    if sum(map(_size, fuller)) <= room:
        return fuller, None
    for level, what in enumerate(LEFT_OUT, 1):
        leaner = _lines(matched, runs, level)
        if (kept := _kept(fuller, leaner, room)) is not None:
            where = f"from prompt {kept + 1:,} of {len(fuller):,} on" if kept else "of all prompts"
            note = f"To keep this page below {max_mb:.3g} MB, {what} {where}; --max-mb lets it be larger."
            return fuller[:kept] + leaner[kept:], note
        fuller = leaner
    least = max_mb + (sum(map(_size, fuller)) - room) / MB
    raise ValueError(f"without any attempts the page has {least:.3g} MB, expected at most {max_mb:g}: raise max_mb")


def _lines(matched: Sequence[Sequence[Row | None]], runs: Sequence[Run], level: int) -> list[str]:
    """Return the details of each prompt. level: 0 = all, 1 = without the texts of rejected attempts, 2 = none."""
    return [
        to_script([
            None if row is None or row.answer is None or level == 2 else details_of(row, run, rejected=level == 0)
            for row, run in zip(rows, runs, strict=True)
        ])
        for rows in matched
    ]  # fmt: skip


def _kept(fuller: Sequence[str], leaner: Sequence[str], room: int) -> int | None:
    """Return how many of the fuller lines fit, where the leaner ones stand for those behind; None = not even these."""
    left = room - sum(map(_size, leaner))
    if left < 0:
        return None
    for place, (more, less) in enumerate(zip(fuller, leaner, strict=True)):
        left -= _size(more) - _size(less)
        if left < 0:
            return place
    return len(fuller)


def _size(line: str) -> int:
    return len(line.encode()) + 1
