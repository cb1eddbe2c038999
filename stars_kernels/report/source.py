"""What a report is made of: a folder of `stars run`, or a file of outputs."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from stars_kernels.data import read_results
from stars_kernels.data.journal import read_rows
from stars_kernels.data.manifest import Manifest
from stars_kernels.data.run import COSTS, MANIFEST, RESULTS
from stars_kernels.data.texts import attempt_texts
from stars_kernels.decoder.output import StarsOutput
from stars_kernels.evaluation.figures import BASE

EXPECTED = "a folder of `stars run` or `stars compare`, or a file of outputs as StarsOutput.to_dict() gives them"

OF_OUTPUTS = {field.name for field in fields(StarsOutput)} - {"memory_limits"}


@dataclass(frozen=True)
class Row:
    """A prompt and what became of it.

    id: of the request. prompt: text, chat messages or token ids; None = not kept. answer: what results.jsonl has of it
    ("text", "reward", "segments", ...); None = it failed. error: why. cost: what costs.jsonl has of it; may be empty.
    """

    id: int | str
    prompt: Any
    answer: Mapping[str, Any] | None
    error: str | None
    cost: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run: its name, what its answers follow from, and its rows.

    config: settings as JSON has them. calibration: as `Calibration.to_dict` gives it, or None. prompts: how many were
    to be answered. seconds: of wall time that it decoded for; None = not known. notes: what a reader has to know.
    """

    name: str
    config: Mapping[str, Any]
    calibration: Mapping[str, Any] | None
    models: Mapping[str, str]
    versions: Mapping[str, str]
    rows: Sequence[Row]
    prompts: int
    seconds: float | None
    notes: Sequence[str] = ()

    @cached_property
    def rule(self) -> str:
        """The rule's name."""
        return "Stars" if self.config.get("rule") is None else str(self.config["rule"]["name"])

    @cached_property
    def rule_settings(self) -> Mapping[str, Any]:
        """The rule's settings; those of STARS lie among the others where no rule is given."""
        return self.config if self.config.get("rule") is None else self.config["rule"].get("settings", {})

    @cached_property
    def mean_reward(self) -> float:
        """Of the answers whose reward is a number; -inf where there is none."""
        rewards = [float(row.answer["reward"]) for row in self.rows if row.answer is not None]
        finite = [reward for reward in rewards if math.isfinite(reward)]
        return sum(finite) / len(finite) if finite else -math.inf

    @cached_property
    def eos(self) -> frozenset[int]:
        """The ids that end an answer, as far as they are known."""
        own = self.config.get("eos_token_id")
        known = self.models.get("eos", "").split(", ") if own is None else own
        return frozenset(int(token) for token in known if str(token).strip())


def read_runs(source: Path) -> list[Run]:
    """Read what lies at `source`: one run, or two of a folder of `stars compare` (`_to_show`).

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist, expected {EXPECTED}")
    if source.is_file():
        of_run = source.name == RESULTS and (source.parent / MANIFEST).exists()
        return [_of_folder(source.parent)] if of_run else [_of_outputs(source)]
    if (source / RESULTS).exists():
        return [_of_folder(source)]
    folders = sorted(file.parent for file in source.glob(f"rules/*/{RESULTS}"))
    if not folders:
        raise ValueError(f"{source} has neither {RESULTS} nor rules/*/{RESULTS}, expected {EXPECTED}")
    runs = _to_show([_of_folder(folder) for folder in folders])
    if len(folders) > 2:
        names = ", ".join(folder.name for folder in folders)
        runs[0] = _noted(runs[0], f"Two of {len(folders)} rules are shown ({names}); --beside chooses others.")
    return runs


def _to_show(runs: Sequence[Run]) -> list[Run]:
    """Choose two of the rules compared: the one with the highest mean reward, and plain sampling beside it."""
    plain = [run for run in runs if run.name == BASE]
    others = sorted((run for run in runs if run.name != BASE), key=lambda run: run.mean_reward, reverse=True)
    return [*others[:1], *plain, *others[1:]][:2]


def with_texts(run: Run, tokenizer: PreTrainedTokenizerBase) -> Run:
    """Return the run with the texts of attempts whose tokens it has."""
    return replace(run, rows=[_row_with_texts(row, tokenizer) for row in run.rows])


def _row_with_texts(row: Row, tokenizer: PreTrainedTokenizerBase) -> Row:
    segments = [] if row.answer is None else row.answer["segments"]
    if row.answer is None or any(segment.get("tokens") is None or "texts" in segment for segment in segments):
        return row
    texts = attempt_texts(tokenizer, segments)
    told = [{**segment, "texts": some} for segment, some in zip(segments, texts, strict=True)]
    return replace(row, answer={**row.answer, "segments": told})


def _of_folder(folder: Path) -> Run:
    """Read a folder of `stars run`, also one that is at work."""
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(f"{folder} has {RESULTS} but no {MANIFEST}, expected both")
    manifest = Manifest.load(path)
    kept = folder / COSTS
    try:
        results = {row["custom_id"]: row for row in read_results(folder)}  # of rows with one id the last counts
        costs = {cost["custom_id"]: cost for cost in (read_rows(kept) if kept.exists() else ())}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} has a line that is no row of a run ({error!r}), expected rows alone") from None
    rows = [
        Row(row_id, row.get("prompt"), None if "error" in row else row, row.get("error"), costs.get(row_id, {}))
        for row_id, row in results.items()
    ]
    calibration = None if manifest.calibration is None else manifest.calibration.to_dict()
    return Run(
        folder.resolve().name, manifest.config, calibration, manifest.models, manifest.versions, rows,
        max(len(manifest.prompts), len(rows)), _seconds(costs.values()),
    )  # fmt: skip


def _seconds(costs: Collection[Mapping[str, Any]]) -> float | None:
    """Return for how long a run decoded, in all its starts; None where that was not kept."""
    if not costs or not all("elapsed" in cost for cost in costs):
        return None
    return float(sum(cost["elapsed"] for cost in costs))


def _of_outputs(path: Path) -> Run:
    """Read a file of outputs: one, a list of them, or one a line."""
    outputs = _parsed(path)
    for place, output in enumerate(outputs, 1):
        if not isinstance(output, Mapping) or not OF_OUTPUTS <= set(output):
            found = f"the keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else type(output).__name__
            raise ValueError(f"{path}, output {place}, has {found or 'no keys'}, expected {EXPECTED}")
    if not outputs:
        raise ValueError(f"{path} has no outputs, expected one at least")
    costs = ("counts", "seconds", "backends", "memory_limits")
    rows = [
        Row(
            output["request_id"], output.get("prompt"), output, None,
            {**{name: output.get(name, {}) for name in costs}, "widths": [s.get("widths") for s in output["segments"]]},
        )
        for output in outputs
    ]  # fmt: skip
    first = outputs[0]
    run = Run(path.stem, first["config"], first.get("calibration"), {}, {}, rows, len(rows), None)
    if any(_decisive(output["config"]) != _decisive(first["config"]) for output in outputs):
        return _noted(run, "The outputs were decoded with different settings; those of the first one are shown.")
    return run


def _parsed(path: Path) -> list[Any]:
    """Read JSON, or JSON lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}), expected {EXPECTED}") from None
    try:
        whole = json.loads(text)
        return whole if isinstance(whole, list) else [whole]
    except (json.JSONDecodeError, RecursionError):
        try:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is neither JSON nor JSON lines ({error}), expected {EXPECTED}") from None


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the page reads."""
    names = ("rule", "beta", "reward_threshold", "accept", "alpha", "segment_size")
    return {name: config.get(name) for name in names}


def _noted(run: Run, note: str) -> Run:
    return replace(run, notes=[*run.notes, note])
