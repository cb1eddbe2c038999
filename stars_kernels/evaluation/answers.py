"""The answers of a run, as they are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stars_kernels.data.journal import Journal
from stars_kernels.data.run import COSTS, RESULTS


@dataclass(frozen=True)
class Answer:
    """One rule's answer to one prompt.

    counts: of attempts and tokens, the same however it was decoded. cost: of what was decoded beside it too; "seconds"
    is its share of wall time, None where that was not kept.
    """

    text: str | None
    token_ids: list[int]
    reward: float
    counts: Mapping[str, int]
    cost: Mapping[str, Any]


def read_answers(folder: Path) -> tuple[dict[int | str, Answer], dict[int | str, str]]:
    """Read a run's answers, and why the other prompts have none, by the prompts' ids in the file's order.

    Raises ValueError where the two files of the run do not belong together.
    """
    answers, errors = dict[int | str, Answer](), dict[int | str, str]()
    with Journal(folder / COSTS) as journal:
        costs = {row["custom_id"]: {**row["counts"], "seconds": row.get("elapsed")} for row in journal}
    with Journal(folder / RESULTS) as journal:
        for row in journal:
            name = row["custom_id"]
            if "error" in row:
                errors[name] = row["error"]
            elif not math.isfinite(reward := float(row["reward"])):
                errors[name] = f"its reward is {reward}, expected a number"
            elif name not in costs:
                raise ValueError(f"{folder} has an answer to {name!r} in {RESULTS} and no row of it in {COSTS}")
            else:
                answers[name] = Answer(row["text"], row["token_ids"], reward, row["counts"], costs[name])
    return answers, errors
