"""Run a file of prompts into a folder; the same run again goes on where it stopped."""

from __future__ import annotations

import fcntl
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from tqdm.auto import tqdm

from stars_kernels.data.journal import Journal
from stars_kernels.data.manifest import Manifest, hashes, versions
from stars_kernels.data.prompts import BadRow, PromptRow, read_prompts
from stars_kernels.decoder.calibration import is_calibrated, with_target
from stars_kernels.decoder.config import Settings, StarsConfig
from stars_kernels.decoder.errors import message_of
from stars_kernels.decoder.output import Calibration, StarsEvent, StarsOutput
from stars_kernels.hf.engine import Config, Engine

MANIFEST, RESULTS, COSTS = "manifest.json", "results.jsonl", "costs.jsonl"
AT_ONCE = 4096
"""Prompts of one call of the engine, at most: their outputs are in memory together."""
DONE = ("eos", "stop", "length", "context")
"""How an answer ends that is whole."""


@dataclass(frozen=True)
class Summary:
    """What a run has come to.

    prompts, answers, errors: how many the file has, are answered, and have failed. seconds: of this start. tokens: of
    answers that it decoded. folder: where all of it lies.
    """

    prompts: int
    answers: int
    errors: int
    seconds: float
    tokens: int
    folder: Path


def run_file(
    engine: Engine,
    prompts: Path | str,
    folder: Path | str,
    *,
    config: Config = None,
    calibration: Calibration | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    retry: bool = False,
    rules: Sequence[type] = (),
    on_event: Callable[[StarsEvent], None] | None = None,
    **settings: Unpack[Settings],
) -> Summary:
    """Answer a file of prompts, and keep each answer as soon as it is there.

    The folder gets `manifest.json` (what the answers follow from), `results.jsonl` (a line per prompt, in the file's
    order once all are there: its answer or its error) and `costs.jsonl` (seconds and tokens, which depend on what was
    decoded beside it). The same call again goes on where the first one stopped, whatever stopped it, and ends with the
    same results. Without r* and beta, they are calibrated on the file's first prompts, once.

    Args:
        prompts: see `read_prompts`.
        limit: prompts of the file to answer; a later call may answer more.
        overwrite: begin anew, in place of what the folder holds.
        retry: try the prompts again that failed.
        rules: dataclasses of the user's own that the settings may name.
        on_event: is told of every segment and every answer.

    Raises:
        ValueError: the folder holds another run: what is different is named; or another process is at work there. Also
            as `Engine.decode`.
        OSError: a file cannot be read or written; what was written is whole.
    """
    began, folder = time.monotonic(), Path(folder)
    known = read_prompts(Path(prompts))
    rows = known[:limit]
    if not rows:
        raise ValueError(f"{prompts} has no prompts, expected one at least")
    resolved = engine.resolve(config, settings)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        files.enter_context(_alone(folder))
        if overwrite:
            for name in (RESULTS, COSTS, MANIFEST):
                (folder / name).unlink(missing_ok=True)
        manifest = _manifest(engine, rows, known, folder, resolved, calibration, rules)
        results, costs = (files.enter_context(Journal(folder / name)) for name in (RESULTS, COSTS))
        done = {i for i, row in results.rows.items() if not (retry and "error" in row)}
        left = [row for row in rows if row.id not in done]
        tokens = 0
        bar = files.enter_context(_Progress(rows, done, manifest.config))
        for row_id, answer, cost in _answers(engine, left, manifest.config, bar, on_event):
            if cost is not None:
                costs.append({"custom_id": row_id, **cost})  # first: an answer that is there has its cost
                tokens += len(answer["token_ids"])
            results.append({"custom_id": row_id, **answer})
        results.sort([row.id for row in known])
        failed = sum("error" in row for row in results.rows.values())
    return Summary(len(rows), len(results.rows) - failed, failed, time.monotonic() - began, tokens, folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let no other process write to the folder meanwhile."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # is gone with the process, whatever ends it
        except BlockingIOError:
            raise ValueError(f"another process is at work in {folder}, expected none") from None
        yield


def _manifest(
    engine: Engine,
    rows: Sequence[PromptRow | BadRow],
    known: Sequence[PromptRow | BadRow],
    folder: Path,
    config: StarsConfig,
    calibration: Calibration | None,
    rules: Sequence[type],
) -> Manifest:
    """Return this run's manifest, and write it; where the folder has one, it has to be of the same run.

    known: rows of the whole file, of which `rows` are the first.
    """
    path = folder / MANIFEST
    before = Manifest.load(path, rules) if path.exists() else None
    if before is None and any((folder / name).exists() for name in (RESULTS, COSTS)):
        raise ValueError(f"{folder} has {RESULTS} but no {MANIFEST}, expected both or neither: give another folder")
    if config.seed is None:
        config = config.replace(seed=secrets.randbits(63) if before is None else before.config.seed)
    if calibration is None and before is not None:
        calibration = before.calibration
    if not is_calibrated(config):
        if calibration is None:
            calibration = engine.calibrate(_readable(engine, rows, config), config=config)
        config = with_target(config, calibration.reward_threshold, calibration.beta)
    models = {"model": engine.models.fingerprint, "reward_model": engine.models.reward_fingerprint}
    now = Manifest(versions(), models, config, calibration, hashes(rows))
    if before is not None:
        if told := before.differences(now, hashes(known)):
            shown = "".join(f"\n  {line}" for line in told[:20]) + ("\n  ..." if len(told) > 20 else "")
            raise ValueError(f"{folder} holds another run, expected the same one, another folder, or overwrite:{shown}")
        now = Manifest(now.versions, models, config, calibration, {**before.prompts, **now.prompts})
    now.save(path)
    return now


def _readable(engine: Engine, rows: Sequence[PromptRow | BadRow], config: StarsConfig) -> list[Any]:
    """Return the first prompts that can be read, as many as are calibrated on."""
    found: list[Any] = []
    for row in rows:
        if len(found) == config.calibration_samples:
            break
        if isinstance(row, PromptRow) and engine.check([row.prompt])[0] is None:
            found.append(row.prompt)
    if not found:
        raise ValueError("no prompt of the file can be read, so there is none to calibrate on")
    return found


def _answers(
    engine: Engine,
    rows: Sequence[PromptRow | BadRow],
    config: StarsConfig,
    bar: _Progress,
    on_event: Callable[[StarsEvent], None] | None,
) -> Iterator[tuple[int | str, dict[str, Any], dict[str, Any] | None]]:
    """Yield the id, what is to be kept, and what it cost, of each prompt as it ends."""
    for row in rows:
        if isinstance(row, BadRow):
            bar.count(None)
            yield row.id, {"error": row.error}, None
    good = [row for row in rows if isinstance(row, PromptRow)]
    for begin in range(0, len(good), AT_ONCE):
        some = good[begin : begin + AT_ONCE]
        quiet = config.replace(progress=False)
        for event in engine.stream([row.prompt for row in some], config=quiet, request_ids=[row.id for row in some]):
            if on_event is not None:
                on_event(event)
            bar.grow(event)
            row, output = some[event.index], event.output
            if isinstance(output, Exception):
                bar.count(None)
                told = message_of(output).replace(f"prompt {event.index}", f"line {row.line}", 1)
                yield row.id, {"error": told}, None
            elif output is not None and output.finish_reason in DONE:
                bar.count(output)
                yield row.id, *_kept(output)


def _kept(output: StarsOutput) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part an output in what is a function of its prompt, and what is not."""
    whole = output.to_dict()
    widths = [segment.pop("widths") for segment in whole["segments"]]
    counts = whole["counts"]
    judged = {name: counts[name] for name in ("judged", "rejected", "attempts", "accepted", "rejections")}
    names = ("text", "token_ids", "reward", "prompt_reward", "finish_reason", "segments")
    cost = {name: whole[name] for name in ("seconds", "backends", "memory_limits")}
    return {name: whole[name] for name in names} | {"counts": judged}, {"counts": counts, "widths": widths, **cost}


class _Progress:
    """A bar of prompts, with tokens per second and the share of attempts that were accepted."""

    def __init__(self, rows: Sequence[PromptRow | BadRow], done: set[int | str], config: StarsConfig) -> None:
        there = sum(row.id in done for row in rows)
        self._bar = tqdm(
            total=len(rows), initial=there, desc="run", unit="prompt", disable=None if config.progress else True
        )
        self._began, self._tokens, self._attempts, self._accepted = time.monotonic(), 0, 0, 0

    def grow(self, event: StarsEvent) -> None:
        """Count what an answer grew by."""
        self._tokens += len(event.token_ids)
        rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
        told = {"tokens/s": f"{rate:.1f}"}
        if self._attempts:
            told["accepted"] = f"{self._accepted / self._attempts:.0%}"
        self._bar.set_postfix(told, refresh=False)

    def count(self, output: StarsOutput | None) -> None:
        """Count a prompt that has ended."""
        if output is not None:
            self._attempts += output.counts.attempts
            self._accepted += output.counts.accepted
        self._bar.update()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *ended: object) -> None:
        self._bar.close()


def read_results(folder: Path | str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a run's results: of an answer as `run_file` kept it, or an id and an error."""
    with (Path(folder) / RESULTS).open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):  # else it is being written
                yield json.loads(line)
