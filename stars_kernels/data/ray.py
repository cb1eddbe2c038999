"""Many engines at once, by Ray: a file of prompts on several processes or machines, and a class for Ray Data."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Unpack

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from stars_kernels.data.manifest import Manifest
from stars_kernels.data.prompts import KEYS, BadLine, PromptLine, id_of, prompt_of
from stars_kernels.data.run import Line, Row, Summary, answers, described, line_name, opened_run, planned
from stars_kernels.decoder.calibration import is_calibrated
from stars_kernels.decoder.checks import check_count_or_none
from stars_kernels.decoder.config import Settings, StarsConfig, resolve_config
from stars_kernels.decoder.errors import causes, message_of
from stars_kernels.decoder.memory import is_out_of_memory
from stars_kernels.decoder.output import Calibration, StarsEvent
from stars_kernels.hf.by_name import engine_by_name
from stars_kernels.hf.engine import Config, Engine

RESTARTS = 3
"""Of an actor whose process has died, at most: what kills it again and again is given up."""
PER_CALL = {"cpu": 32, "cuda": 256}
"""Prompts of one call of an actor, at most: as many as have slots on a GPU; fewer on a CPU, where an answer takes long
and a kill loses what is under way."""
Kept = tuple[int | str, Row, Row | None]
"""An id, what is to be kept, and what it cost."""
_BROKEN = ("CUDA error", "HIP error", "device-side assert", "CUBLAS_STATUS", "CUDNN_STATUS")
"""Of the plain RuntimeErrors after which a process can use its GPU no more."""


class StarsPredictor:
    """Aligned answers to batches of prompts, for `ray.data.Dataset.map_batches`: an engine in each actor.

        dataset.map_batches(
            StarsPredictor,
            fn_constructor_kwargs={"model": ..., "reward_model": ..., "seed": 0, "reward_threshold": 1.0, "beta": 0.5},
            compute=ray.data.ActorPoolStrategy(size=2), batch_size=32, num_gpus=1,
        )

    A batch has the column `id` (integers or strings, of which the random numbers of an answer are made), and of
    `prompt` (texts), `messages` (chats) and `prompt_token_ids` the one that a row's prompt is in. The result has all
    columns of the batch, and beside them `text`, `reward` (NaN for a failure), `finish_reason`, `result` (a line of
    JSON as in a run's results.jsonl) and `error`, which is empty where there is none: a bad prompt is such a row.

    Where the process can decode no more (see `is_fatal`), it ends, and Ray starts another one in its place.
    """

    def __init__(
        self,
        model: str,
        reward_model: str | Iterable[str],
        *,
        calibration: Calibration | None = None,
        device: str | None = None,
        dtype: str | None = None,
        threads: int | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        """Load the models.

        Args:
            model, reward_model, device, dtype: as of `stars_kernels.hf.by_name.engine_by_name`.
            calibration: r* and beta, unless the settings have both.
            threads: of torch, on a CPU; None = as torch finds them.
            settings: of `StarsConfig`; the seed must be among them.

        Raises:
            ValueError: seed, r* or beta is open, so that each actor would have its own; or as `Engine`.
        """
        config = resolve_config(None, settings)
        _check_times(config)
        if config.seed is None:
            raise ValueError("seed is None, expected a number: each actor would draw one of its own")
        if calibration is None and not is_calibrated(config):
            raise ValueError(
                "reward_threshold or beta is None, expected both, or calibration=: each actor would find its own"
            )
        self.engine = _quiet_engine(threads, _names(model, reward_model, device, dtype), config)
        self.config = config if calibration is None else self.engine.with_calibration(config, calibration)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a batch of columns. Raises ValueError or TypeError where it has not those that are needed."""
        lines = _lines_of(batch)
        found: dict[int | str, Row] = {line.id: {"error": line.error} for line in lines if isinstance(line, BadLine)}
        good = [line for line in lines if isinstance(line, PromptLine)]
        for line_id, answer, _ in _answered(self.engine, good, self.config, lambda line: f"prompt {line.id!r}"):
            found[line_id] = answer
        rows = [found[line.id] for line in lines]
        return {
            **batch,
            "text": [row.get("text", "") for row in rows],
            "reward": np.array([row.get("reward", math.nan) for row in rows], dtype=np.float64),
            "finish_reason": [row.get("finish_reason", "") for row in rows],
            "result": [json.dumps({"custom_id": line.id, **found[line.id]}, ensure_ascii=False) for line in lines],
            "error": [row.get("error", "") for row in rows],
        }


def run_file_ray(
    prompts: Path | str,
    folder: Path | str,
    *,
    model: str,
    reward_model: str | Iterable[str],
    actors: int | None = None,
    address: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    per_call: int | None = None,
    config: Config = None,
    calibration: Calibration | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    retry: bool = False,
    **settings: Unpack[Settings],
) -> Summary:
    """Answer a file of prompts by several engines at once, each in an actor of Ray; else as `run_file`.

    The results are the same, byte for byte, as those of `run_file`, which may go on with this run, and the other way
    round. The folder is written by this process alone: a run goes on from what is kept there, so that Ray has to
    remember nothing. The first actor loads the models, and calibrates where r* or beta is open; the others are started
    once that is done, and are refused where their models or versions are not those of the first.

    An actor whose process dies is started again, up to RESTARTS times, and answers anew what it was about. One that
    dies more often is given up, and so are its prompts of that time, for this start; the others go on.

    Args:
        model, reward_model: names, as of `engine_by_name`; every machine has to have them.
        actors: None = one a GPU of the cluster, or without any one a machine.
        address: of a cluster that runs ("auto" = the one of this machine); None = the environment's RAY_ADDRESS, else a
            cluster of this machine that ends with the run.
        device: None = cuda where the cluster has GPUs, else cpu.
        dtype: float32, bfloat16 or float16; None = as saved.
        per_call: prompts that an actor answers in one call, and that are kept together; None = up to 32 on a CPU, 256
            on a GPU. As many an actor are decoded again after a kill.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster at this address.
        ChildProcessError: all actors have died more often than that.
        ValueError, TypeError, OSError: as `run_file`; also for max_time, and for more actors than GPUs.
    """
    resolved = resolve_config(config, settings)
    _check_times(resolved)
    check_count_or_none("per_call", per_call)
    with _connected(address) as ray:
        place = _place_of(ray, actors, device)
        pool = _Pool(ray, place, _names(model, reward_model, place.device, dtype), resolved)
        try:
            with opened_run(
                prompts, folder, lambda *given: pool.plan(calibration, *given),
                limit=limit, overwrite=overwrite, retry=retry,
            ) as run, run.progress() as bar:  # fmt: skip
                for rows in pool.answers(run.left, run.config, run.manifest, per_call):
                    for row in rows:
                        run.keep(*row)
                        bar.count(None)
            return run.summary()
        finally:
            pool.close()


def is_fatal(error: BaseException) -> bool:
    """Say whether no later call of this process can succeed: its GPU has failed, not for want of memory.

    That is an error of CUDA or HIP, which stays with the process that met it, in `error` or in what it was raised from.
    """
    return not is_out_of_memory(error) and any(
        isinstance(link, torch.AcceleratorError)
        or (isinstance(link, RuntimeError) and any(words in message_of(link) for words in _BROKEN))
        for link in causes(error)
    )


def _answered(
    engine: Engine,
    lines: Sequence[PromptLine],
    config: StarsConfig,
    name_of: Callable[[PromptLine], str] = line_name,
) -> list[Kept]:
    """Answer prompts, and end the process where it can decode no more: it would fail at whatever Ray gives it next.

    Memory that ran out for one prompt is that prompt's error. Where it ran out beside them, the process ends too.
    """

    def watch(event: StarsEvent) -> None:
        if isinstance(event.output, Exception) and is_fatal(event.output):
            _end_process(event.output)

    try:
        return list(answers(engine, lines, config, on_event=watch, name_of=name_of))
    except Exception as error:
        if is_fatal(error) or is_out_of_memory(error):
            _end_process(error)
        raise


def _end_process(error: Exception) -> NoReturn:
    print(f"this process can decode no more, and ends: {message_of(error)}", file=sys.stderr, flush=True)
    os._exit(1)  # an exception would leave the actor as it is, and Ray would ask it again


def _quiet_engine(threads: int | None, names: Mapping[str, Any], config: StarsConfig) -> Engine:
    """Load the models in an actor."""
    if threads is not None:
        torch.set_num_threads(threads)
    disable_progress_bar()  # of loading: one per actor would be shown
    return engine_by_name(**names, config=config.replace(progress=False))


def _names(
    model: str, reward_model: str | Iterable[str], device: str | None, dtype: str | None
) -> dict[str, str | list[str] | None]:
    """Return what `engine_by_name` takes, as it can be sent to an actor."""
    rewards = [reward_model] if isinstance(reward_model, str) else list(reward_model)
    return {"model": model, "reward_model": rewards, "device": device, "dtype": dtype}


def _check_times(config: StarsConfig) -> None:
    if config.max_time is not None:
        raise ValueError(f"max_time is {config.max_time}, expected None: with Ray it would hold for each batch anew")


def _lines_of(batch: Mapping[str, Any]) -> list[Line]:
    """Return the prompts of a batch of columns."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"the batch is of type {type(batch).__name__}, expected columns, as of batch_format='numpy'")
    columns = [name for name in KEYS if name in batch]
    if "id" not in batch or not columns:
        raise ValueError(f"the batch has the columns {', '.join(batch)}, expected id and one of {', '.join(KEYS)}")
    rows = ({name: _plain(batch[name][i]) for name in ("id", *columns)} for i in range(len(batch["id"])))
    return [_line_of(row, number) for number, row in enumerate(rows)]


def _line_of(row: Mapping[str, Any], number: int) -> Line:
    if row["id"] is None:
        raise ValueError("the column id has an empty entry, expected an integer or a string in every row")
    line_id = id_of(row, number)
    try:
        return PromptLine(line_id, prompt_of(row), number)
    except ValueError as error:
        return BadLine(line_id, f"prompt {line_id!r}: {error}", number, "")


def _plain(value: Any) -> Any:
    """Return a cell of a column as JSON would have it; Arrow gives each message all keys that any message has."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items() if part is not None}
    return [_plain(part) for part in value] if isinstance(value, list) else value


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Import Ray, and connect to a cluster, or begin one of this machine, unless this process is connected already."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ImportError("Ray is missing: pip install 'stars-kernels[ray]'") from None
    if ray.is_initialized():
        if address is not None:
            raise ValueError(f"address is {address!r}, but this process is connected to Ray already, expected None")
        yield ray
        return
    place = address or os.environ.get("RAY_ADDRESS") or "local"
    ray.init(place, include_dashboard=False, logging_level=logging.ERROR)
    try:
        yield ray
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class _Place:
    """What actors there are, and what each gets of the cluster."""

    actors: int
    device: str
    cpus: float

    @property
    def options(self) -> dict[str, Any]:
        """Of each actor, as Ray has them."""
        gpus = 1 if self.device == "cuda" else 0
        return {"num_cpus": self.cpus, "num_gpus": gpus, "max_restarts": RESTARTS, "max_task_retries": RESTARTS}

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))


def _place_of(ray: Any, actors: int | None, device: str | None) -> _Place:
    """Share the cluster out: a GPU an actor, or else the CPUs of each machine evenly."""
    check_count_or_none("actors", actors)
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device is {device!r}, expected cpu, cuda or None: Ray gives each actor its GPU")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    if device is None:
        device = "cuda" if any(gpus) else "cpu"
    if device == "cuda":
        if (actors or 1) > sum(gpus):
            raise ValueError(f"actors is {actors}, but the cluster has {sum(gpus)} GPUs, expected one an actor")
        share = min(node["CPU"] / count for node, count in zip(nodes, gpus, strict=True) if count)
        return _Place(actors or sum(gpus), device, _rounded(share))
    actors = actors or len(nodes)
    return _Place(actors, device, _rounded(min(node["CPU"] for node in nodes) / -(-actors // len(nodes))))


def _rounded(cpus: float) -> float:
    """Round a share of CPUs down, to whole ones, or else to hundredths."""
    return float(int(cpus)) if cpus >= 1 else max(int(cpus * 100), 1) / 100


class _Worker:
    """An actor: an engine in a process of its own. Its models are loaded where they are first needed, so that what is
    wrong with them is an error of that call, as Ray tells one in a constructor only after some tries."""

    def __init__(self, threads: int, names: Mapping[str, Any], config: StarsConfig) -> None:
        self._given = threads, names, config

    @cached_property
    def _engine(self) -> Engine:
        return _quiet_engine(*self._given)

    def plan(
        self, calibration: Calibration | None, lines: Sequence[Line], before: Manifest | None
    ) -> tuple[StarsConfig, Manifest]:
        """As `planned`."""
        config = self._given[2]
        if calibration is not None:
            config = self._engine.with_calibration(config, calibration)
        return planned(self._engine, lines, config, calibration, before)

    def answer(self, config: StarsConfig, manifest: Manifest, lines: Sequence[PromptLine]) -> list[Kept]:
        """Answer prompts. Raises ValueError where versions or models are others than the manifest says."""
        versions, models = described(self._engine)
        here = replace(manifest, versions=versions, models=models)
        if told := manifest.differences(here, ()):
            raise ValueError(f"an actor of Ray differs from the first one, expected the same on all: {'; '.join(told)}")
        return _answered(self._engine, lines, config)


class _Pool:
    """The actors of a run. The first one is there from the beginning, the others once there are prompts for them."""

    def __init__(self, ray: Any, place: _Place, names: Mapping[str, Any], config: StarsConfig) -> None:
        kind = ray.remote(**place.options)(_Worker)
        self._ray, self._place = ray, place
        self._make = lambda: kind.remote(place.threads, names, config)
        self._actors = [self._make()]

    def plan(self, *given: Any) -> tuple[StarsConfig, Manifest]:
        """Let the first actor plan the run."""
        try:
            config, manifest = self._result(self._actors[0].plan.remote(*given))
        except self._ray.exceptions.RayActorError as error:
            raise ChildProcessError(
                f"the first actor died {RESTARTS + 1} times before the run began. Ray says: {message_of(error)}"
            ) from None
        return config, manifest

    def answers(
        self, lines: Sequence[PromptLine], config: StarsConfig, manifest: Manifest, per_call: int | None
    ) -> Iterator[list[Kept]]:
        """Yield what each call has answered, as it comes; an actor gets its next prompts when it has done the last."""
        share = -(-len(lines) // self._place.actors)
        size = max(1, min(PER_CALL[self._place.device] if per_call is None else per_call, share))
        waiting = deque(lines[i : i + size] for i in range(0, len(lines), size))
        self._actors += [self._make() for _ in range(min(self._place.actors, len(waiting)) - 1)]
        shared = [self._ray.put(part) for part in (config, replace(manifest, prompts={}))]
        free, at = list(self._actors), dict[Any, tuple[Any, Sequence[PromptLine]]]()
        while waiting or at:
            while waiting and free:
                actor, some = free.pop(), waiting.popleft()
                at[actor.answer.remote(*shared, some)] = actor, some
            if not at:
                raise ChildProcessError(f"all actors have died, and {sum(map(len, waiting))} more prompts are left")
            (done, *_), _ = self._ray.wait(list(at), num_returns=1)
            actor, some = at.pop(done)
            try:
                yield self._result(done)
            except self._ray.exceptions.RayActorError as error:
                _tell_of_death(error, some)
            else:
                free.append(actor)

    def _result(self, task: Any) -> Any:
        """Wait for a call's result; what it raised is raised as it was, without Ray's words about it."""
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def close(self) -> None:
        """End the actors, and what they are about."""
        for actor in self._actors:
            self._ray.kill(actor)


def _tell_of_death(error: Exception, lines: Sequence[PromptLine]) -> None:
    ids = ", ".join(repr(line.id) for line in lines[:5]) + (", ..." if len(lines) > 5 else "")
    warnings.warn(
        f"an actor died {RESTARTS + 1} times and is given up, while it answered {len(lines)} prompts, which are left: "
        f"{ids}. Ray says: {message_of(error)}",
        RuntimeWarning,
        stacklevel=2,
    )
