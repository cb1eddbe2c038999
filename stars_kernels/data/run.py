"""Run a file of prompts into a folder; the same run again goes on where it stopped."""

from __future__ import annotations

import fcntl
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from stars_kernels.data.datasets import load_prompts
from stars_kernels.data.journal import Journal, read_rows
from stars_kernels.data.manifest import Manifest, hashes, tokenizer_fingerprint, versions
from stars_kernels.data.prompts import BadLine, PromptLine
from stars_kernels.data.texts import attempt_texts
from stars_kernels.decoder.calibration import is_calibrated, with_target
from stars_kernels.decoder.checks import check_count_or_none
from stars_kernels.decoder.config import Settings, StarsConfig
from stars_kernels.decoder.errors import message_of
from stars_kernels.decoder.output import Calibration, StarsEvent, StarsOutput
from stars_kernels.decoder.rules import Stars
from stars_kernels.hf.engine import Config, Engine

MANIFEST, RESULTS, COSTS = "manifest.json", "results.jsonl", "costs.jsonl"
CHUNK = 4096
"""Prompts of one call of the engine, at most: their outputs are in memory together."""
WHOLE = ("eos", "stop", "length", "context")
"""How an answer ends that nothing cut short."""
Line = PromptLine | BadLine
Row = dict[str, Any]
"""Of a journal, but for the custom_id."""


@dataclass(frozen=True)
class Summary:
    """What a run has come to.

    prompts, answers, errors: how many were to be answered, are, and have failed; the others are left. seconds: of this
    start. tokens: of answers that it decoded. folder: where all of it lies.
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
    on_event: Callable[[StarsEvent], None] | None = None,
    **settings: Unpack[Settings],
) -> Summary:
    """Answer a file of prompts, and keep each answer as soon as it is there.

    The folder gets `manifest.json` (what the answers follow from), `results.jsonl` (a row per prompt, in the file's
    order once all are there: its answer or its error) and `costs.jsonl` (seconds and tokens, which depend on what was
    decoded beside it; `elapsed` is the wall time since the answer before it). With trace="full" the segments of a row
    have the `texts` of all judged attempts beside their tokens. The same call again goes on where the first one
    stopped, whatever stopped it, and ends with the same results. Without r* and beta, they are calibrated once, on the
    first `calibration_samples` prompts of the file that can be read.

    Args:
        prompts: a file, or the name of a data set; see `load_prompts`.
        limit: answer the file's first ones alone, so many; a later call may answer more.
        overwrite: begin anew, in place of what the folder holds.
        retry: try the prompts again that failed.
        on_event: is told of every segment and every answer, once it is kept.

    Raises:
        ValueError: the folder holds another run: what is different is named; or another process is at work there. Also
            as `Engine.decode`.
        OSError: a file cannot be read or written; what was written is whole.
    """
    resolved = engine.resolve(config, settings)
    if calibration is not None:
        resolved = engine.with_calibration(resolved, calibration)

    def plan(lines: Sequence[Line], before: Manifest | None) -> tuple[StarsConfig, Manifest]:
        return planned(engine, lines, resolved, calibration, before)

    with opened_run(prompts, folder, plan, limit=limit, overwrite=overwrite, retry=retry) as run:
        with run.progress() as bar, closing(answers(engine, run.left, run.config, bar, on_event)) as found:
            for line_id, answer, cost in found:
                run.keep(line_id, answer, cost)
    return run.summary()


def read_results(folder: Path | str) -> Iterator[Mapping[str, Any]]:
    """Read the rows of a run's results: of an answer as `run_file` kept it, or an id and an error."""
    return read_rows(Path(folder) / RESULTS)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let no other process write to the folder meanwhile."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # is gone with the process, whatever ends it
        except BlockingIOError:
            raise ValueError(f"another process is at work in {folder}, expected none") from None
        yield


@dataclass
class OpenRun:
    """A run in its folder, while this process alone is at work there.

    config: the settings, with seed, r* and beta. manifest: what the answers follow from. lines: of the file of prompts.
    wanted: those that are to be there at the end. left: the prompts among them that are to be answered yet.
    began, last: when it was opened, and when the last answer came. tokens: of its answers.
    """

    folder: Path
    config: StarsConfig
    manifest: Manifest
    lines: Sequence[Line]
    wanted: Sequence[Line]
    left: Sequence[PromptLine]
    results: Journal
    costs: Journal
    began: float
    last: float
    tokens: int = 0

    def keep(self, line_id: int | str, answer: Row, cost: Row | None) -> None:
        """Write what a prompt came to, and what it cost."""
        if cost is not None:  # first: an answer that is there has its cost
            now = time.monotonic()
            elapsed, self.last = now - self.last, now  # of all answers, their sum is the wall time of all starts
            self.costs.append({"custom_id": line_id, "elapsed": elapsed, **cost})
            self.tokens += len(answer["token_ids"])
        self.results.append({"custom_id": line_id, **answer})

    def progress(self) -> Progress:
        """Make the bar of the prompts."""
        return Progress(len(self.wanted), len(self.wanted) - len(self.left), self.config)

    def summary(self) -> Summary:
        """Count what it has come to."""
        there = [line.id for line in self.wanted if line.id in self.results]
        failed = sum(line_id in self.results.failed for line_id in there)
        seconds = time.monotonic() - self.began
        return Summary(len(self.wanted), len(there) - failed, failed, seconds, self.tokens, self.folder)


@contextmanager
def opened_run(
    prompts: Path | str,
    folder: Path | str,
    plan: Callable[[Sequence[Line], Manifest | None], tuple[StarsConfig, Manifest]],
    *,
    limit: int | None,
    overwrite: bool,
    retry: bool,
) -> Iterator[OpenRun]:
    """Open a run's folder: begin the run, or go on with the one that it holds; at the end of the block, sort its rows.

    Args:
        plan: as `planned`, by whoever has an engine.

    Lines that hold no prompt are errors at once. The other arguments, and what is raised: as `run_file`.
    """
    began, folder = time.monotonic(), Path(folder)
    check_count_or_none("limit", limit)
    lines = load_prompts(prompts)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        held.enter_context(locked(folder))
        before = _manifest_of(folder, overwrite)
        config, manifest = plan(lines, before)
        _begin(folder, before, manifest, overwrite)
        results, costs = (held.enter_context(Journal(folder / name)) for name in (RESULTS, COSTS))
        wanted = lines[:limit]
        left = [line for line in wanted if line.id not in results or (retry and line.id in results.failed)]
        good = [line for line in left if isinstance(line, PromptLine)]
        run = OpenRun(folder, config, manifest, lines, wanted, good, results, costs, began, time.monotonic())
        for line in left:
            if isinstance(line, BadLine):
                run.keep(line.id, {"error": line.error}, None)
        yield run
        results.sort([line.id for line in lines])


def _manifest_of(folder: Path, overwrite: bool) -> Manifest | None:
    """Return the manifest of the run that a folder holds; None where a new one is to begin."""
    path = folder / MANIFEST
    if path.exists() and not overwrite:
        return Manifest.load(path)
    if not overwrite and any((folder / name).exists() for name in (RESULTS, COSTS)):
        raise ValueError(f"{folder} has {RESULTS} but no {MANIFEST}, expected both or neither: give another folder")
    return None


def planned(
    engine: Engine,
    lines: Sequence[Line],
    config: StarsConfig,
    calibration: Calibration | None,
    before: Manifest | None,
) -> tuple[StarsConfig, Manifest]:
    """Return a run's settings with seed, r* and beta, and its manifest.

    What the settings leave open is as in the manifest `before`; without one, the seed is drawn, and r* and beta are
    calibrated.
    """
    if config.seed is None:
        config = config.replace(seed=secrets.randbits(63) if before is None else before.config["seed"])
    if before is not None:
        calibration = before.calibration if calibration is None else calibration
    elif calibration is None and not is_calibrated(config):
        calibration = engine.calibrate(readable_prompts(engine, lines, config.calibration_samples), config=config)
    if calibration is not None and not is_calibrated(config):
        config = with_target(config, calibration.reward_threshold, calibration.beta)
    return config, Manifest(*described(engine), config.to_dict(), calibration, hashes(lines))


def described(engine: Engine) -> tuple[dict[str, str], dict[str, str]]:
    """Return the versions and the models of an engine, as a manifest has them."""
    models = {
        "model": engine.models.fingerprint,
        "reward_model": engine.models.reward_fingerprint,
        "tokenizer": tokenizer_fingerprint(engine.models.tokenizer),
        "eos": ", ".join(map(str, engine.models.eos)),
    }
    return versions(engine.models.lm.device.type), models


def _begin(folder: Path, before: Manifest | None, now: Manifest, overwrite: bool) -> None:
    """Write this run's manifest. Where the folder has one, it has to be of the same run."""
    if before is not None:
        with Journal(folder / RESULTS) as results:
            told = before.differences(now, results.answered)
        if told:
            shown = "".join(f"\n  {line}" for line in told[:20]) + ("\n  ..." if len(told) > 20 else "")
            raise ValueError(
                f"{folder} holds another run; expected the same one, another folder, or overwrite (--overwrite):{shown}"
            )
    if overwrite:
        for name in (RESULTS, COSTS):
            (folder / name).unlink(missing_ok=True)
    now.save(folder / MANIFEST)


def readable_prompts(engine: Engine, lines: Sequence[Line], most: int) -> list[Any]:
    """Return the first prompts that can be read, so many at most.

    Raises ValueError where none can be read.
    """
    found: list[Any] = []
    for line in lines:
        if len(found) == most:
            break
        if isinstance(line, PromptLine) and engine.check([line.prompt])[0] is None:
            found.append(line.prompt)
    if not found:
        raise ValueError("no prompt of the file can be read, so there is none to calibrate on")
    return found


def line_name(line: PromptLine) -> str:
    """Say which prompt of a file it is."""
    return f"line {line.line}"


def answers(
    engine: Engine,
    lines: Sequence[PromptLine],
    config: StarsConfig,
    bar: Progress | None = None,
    on_event: Callable[[StarsEvent], None] | None = None,
    name_of: Callable[[PromptLine], str] = line_name,
) -> Generator[tuple[int | str, Row, Row | None], None, None]:
    """Yield the id, what is to be kept, and what it cost, of each prompt as it ends.

    name_of: what an error calls a prompt.
    """
    quiet, cut = config.replace(progress=False), False
    for begin in range(0, len(lines), CHUNK):
        some = lines[begin : begin + CHUNK]
        prompts, ids = [line.prompt for line in some], [line.id for line in some]
        with closing(engine.stream(prompts, config=quiet, request_ids=ids)) as events:
            for event in events:
                line, output = some[event.index], event.output
                if isinstance(output, Exception):
                    told = message_of(output).replace(f"prompt {event.index}", name_of(line), 1)
                    yield line.id, {"error": told}, None
                elif output is not None and output.finish_reason in WHOLE:
                    yield line.id, *_kept(output, line.prompt, engine.models.tokenizer)
                cut = cut or (isinstance(output, StarsOutput) and output.finish_reason not in WHOLE)
                if bar is not None:
                    bar.grow(event)
                if on_event is not None:
                    on_event(event)
        if cut:  # by max_time
            return


def _kept(output: StarsOutput, prompt: Any, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Row, Row]:
    """Part an output in what is a function of its prompt, beside the prompt, and what is not."""
    whole = output.to_dict()
    if tokenizer is not None and all(segment["tokens"] is not None for segment in whole["segments"]):
        texts = attempt_texts(tokenizer, whole["segments"])
        for segment, of_attempts in zip(whole["segments"], texts, strict=True):
            segment["texts"] = of_attempts
    widths = [segment.pop("widths") for segment in whole["segments"]]
    counts = whole["counts"]
    judged = {name: counts[name] for name in ("judged", "rejected", "attempts", "accepted", "rejections")}
    names = ("text", "token_ids", "reward", "prompt_reward", "finish_reason", "segments")
    cost = {name: whole[name] for name in ("seconds", "backends", "memory_limits")}
    answer = {"prompt": prompt, **{name: whole[name] for name in names}, "counts": judged}
    return answer, {"counts": counts, "widths": widths, **cost}


class Progress:
    """A bar of prompts, with tokens per second and, of STARS, the share of attempts that were accepted."""

    def __init__(self, prompts: int, there: int, config: StarsConfig) -> None:
        shown = None if config.progress else True  # None: where stderr is a terminal
        self._bar = tqdm(total=prompts, initial=there, desc="run", unit="prompt", disable=shown)
        self._tests = isinstance(config.resolved_rule, Stars)
        self._began, self._tokens, self._attempts, self._accepted = time.monotonic(), 0, 0, 0

    def grow(self, event: StarsEvent) -> None:
        """Count what an answer grew by, and its end."""
        self._tokens += len(event.token_ids)
        told = {"tokens/s": f"{self._tokens / max(time.monotonic() - self._began, 1e-9):.1f}"}
        if self._tests and self._attempts:
            told["accepted"] = f"{self._accepted / self._attempts:.0%}"
        self._bar.set_postfix(told, refresh=False)
        if event.output is not None:
            self.count(event.output)

    def count(self, output: StarsOutput | Exception | None) -> None:
        """Count a prompt that has ended."""
        if isinstance(output, StarsOutput):
            self._attempts += output.counts.attempts
            self._accepted += output.counts.accepted
        self._bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *ended: object) -> None:
        self._bar.close()
