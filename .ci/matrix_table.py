"""Write build/matrix/SET/row.json of one set's tests, and the table of all sets so far in build/matrix/table.md.

python .ci/matrix_table.py build/matrix/SET    # by .ci/matrix, in the set's environment
"""

import json
import platform
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree


def row(folder: Path) -> dict:
    """Versions, tests passed and failed, and how many were skipped, by reason, from pytest's JUnit files."""
    cases = [case for file in sorted(folder.glob("*.xml")) for case in ElementTree.parse(file).iter("testcase")]
    skipped = Counter(case.find("skipped").get("message") for case in cases if case.find("skipped") is not None)
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    return {
        "set": folder.name,
        "versions": [platform.python_version(), *map(version, ("torch", "triton", "transformers"))],
        "passed": len(cases) - failed - skipped.total(),
        "failed": failed,
        "skipped": dict(sorted(skipped.items())),
    }


def table(rows: list[dict]) -> str:
    lines = ["| set | Python | torch | triton | transformers | passed | failed | skipped |", "|---" * 8 + "|"]
    for one in rows:
        versions = " | ".join(one["versions"])
        counts = f"{one['passed']} | {one['failed']} | {sum(one['skipped'].values())}"
        lines.append(f"| `{one['set']}` | {versions} | {counts} |")
    reasons: dict[str, dict[str, int]] = {}
    for one in rows:
        for reason, count in one["skipped"].items():
            reasons.setdefault(reason, {})[one["set"]] = count
    lines += ["", "| skipped because | " + " | ".join(f"`{one['set']}`" for one in rows) + " |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for reason, counts in sorted(reasons.items()):
        lines.append(f"| {reason} | " + " | ".join(str(counts.get(one["set"], 0)) for one in rows) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    this = Path(sys.argv[1])
    (this / "row.json").write_text(json.dumps(row(this), indent=1) + "\n")
    text = table([json.loads(file.read_text()) for file in sorted(this.parent.glob("*/row.json"))])
    (this.parent / "table.md").write_text(text)
    print(text)
