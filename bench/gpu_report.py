"""python -m bench.gpu_report FOLDER: not_reached.txt and report.md from what bench/gpu.sh has written so far."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

TAIL = 40


def rows(table: str) -> list[tuple[str, str, str, str]]:
    """(part, status, seconds, limit) of each line of table.txt but the first."""
    found = (re.fullmatch(r"(\S+) +(.+?) +(\d*) +(\d+)", line) for line in table.splitlines()[1:])
    return [row.groups() for row in found if row]  # type: ignore[misc]


def skipped(report: Path) -> list[str]:
    """The skipped tests of a JUnit file of pytest, each with its reason."""
    tests = ElementTree.parse(report).getroot().iter("testcase")
    cases = ((test, test.find("skipped")) for test in tests)
    return [
        f"{test.get('classname')}::{test.get('name')}: {reason.get('message')}"
        for test, reason in cases
        if reason is not None
    ]


def not_reached(folder: Path) -> list[str]:
    """What a run left out: parts, then tests, each by name and with its reason."""
    parts = (folder / "not_run.txt").read_text().splitlines()
    done = [folder / f"{part}.xml" for part, *_ in rows((folder / "table.txt").read_text())]
    return parts + [line for report in done if report.exists() for line in skipped(report)]


def report(folder: Path, missing: list[str]) -> str:
    """The whole run as Markdown."""
    table = rows((folder / "table.txt").read_text())
    lines = ["# stars-kernels, bench/gpu.sh", "", "| part | status | seconds | limit |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in table]
    for name, file in (("Versions", folder / "versions.log"), ("First numbers", folder / "first.md")):
        if file.exists():
            text = file.read_text().rstrip()
            lines += ["", f"## {name}", "", *([text] if file.suffix == ".md" else fenced(text))]
    for part, status, *_ in table:
        if status.startswith("FAILED"):
            log = folder / f"{part}.log"
            tail = log.read_text(errors="replace").splitlines()[-TAIL:] if log.exists() else ["no log"]
            lines += ["", f"## {part}: {status}", "", *fenced("\n".join(tail))]
    lines += ["", "## Not reached", "", *(f"- {line}" for line in missing or ["nothing was left out"])]
    return "\n".join(lines) + "\n"


def fenced(text: str) -> list[str]:
    return ["````", text, "````"]


def main() -> int:
    folder = Path(sys.argv[1])
    missing = not_reached(folder)
    for name, text in (
        ("not_reached.txt", "".join(f"{line}\n" for line in missing)),
        ("report.md", report(folder, missing)),
    ):
        new = folder / f"{name}.new"
        new.write_text(text)
        new.replace(folder / name)  # whole or not at all
    return 0


if __name__ == "__main__":
    sys.exit(main())
