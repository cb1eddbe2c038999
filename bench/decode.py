"""decode: ours against hand-written loops, for one prompt and for several."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from bench import heads, models
from bench.batched import batched_decode
from bench.cached import cached_decode
from bench.common import Result, check_triton
from bench.machine import Forward, wait
from bench.ours import counted, decode_once, ours_decode
from bench.report import CheckError, Row
from bench.script import MEAN_ATTEMPTS, Script
from demo.arguments import whole
from demo.naive import generate_options, naive_decode
from stars_kernels import StarsConfig
from stars_kernels.hf.proposing.proposer import ModelProposer
from stars_kernels.hf.rule_checks import first_plan
from stars_kernels.ops.philox import request_key

T = TypeVar("T")

SEGMENT = 15
SEGMENTS = 8
BATCHED_ROWS = {1: 8, 8: 24}
"""Rows a round of the `batched` contestant, by number of prompts: about what `width="auto"` takes."""
TARGETS = {
    ("one prompt", "naive"): 8.0,
    ("one prompt", "plain"): 1.2,
    ("8 prompts", "naive"): 14.0,
    ("8 prompts of 1024 tokens", "batched"): 3.0,
}
"""Times faster, by job and contestant, with the model `smol`."""
OVERHEAD_TARGET = 0.08
"""Share of a decode outside the models' forwards."""
LONG_PROMPT_TOKENS = 1024
REWARDS = ("scripted", "real")
"""Of the job above, or the demo's: `heads`."""
ONCE = "an engine a call"
"""As which `stars_kernels.decode` is timed."""


@dataclass(frozen=True)
class Job:
    """What a contestant has to do: all prompts, each to the end of the budget."""

    loaded: models.Models
    prompts: list[list[int]]
    config: StarsConfig
    seeded: bool = False
    """Draw the engine's tokens, for the check; else the contestants draw as transformers does."""

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    @property
    def rm(self) -> PreTrainedModel:
        return self.loaded.rm

    @property
    def keys(self) -> list[int]:
        return request_keys(self.config, len(self.prompts))

    @property
    def segment_size(self) -> int:
        return first_plan(self.config).size

    @property
    def segments(self) -> int:
        """Of all prompts together."""
        return len(self.prompts) * -(-self.config.max_new_tokens // self.segment_size)

    def cut(self, prompts: int, segments: int) -> Job:
        config = self.config.replace(max_new_tokens=segments * self.segment_size)
        return replace(self, prompts=self.prompts[:prompts], config=config)


def request_keys(config: StarsConfig, prompts: int) -> list[int]:
    """Return the keys of requests whose ids are 0 to prompts - 1."""
    assert config.seed is not None
    return [request_key(config.seed, p) for p in range(prompts)]


def scripted(config: StarsConfig, segment_size: int, prompts: int) -> StarsConfig:
    """Return the config with the script as its rule."""
    return config.replace(rule=Script(segment_size, tuple(request_keys(config, prompts))))


def make_job(
    model_name: str,
    prompts: int,
    prompt_tokens: int = models.PROMPT_TOKENS,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Job:
    """Load the models, with a script for as many prompts."""
    loaded = models.load(model_name, prompts, dtype, prompt_tokens, device)
    config = StarsConfig(
        max_new_tokens=SEGMENT * SEGMENTS, temperature=1.0, top_k=40, seed=0, eos_token_id=(), progress=False
    )
    return Job(loaded, loaded.prompts, scripted(config, SEGMENT, prompts))


# The contestants: each does the whole job


def ours(job: Job) -> list[Result]:
    """Decode by the engine of the models, which the first call makes."""
    return ours_decode(job.loaded, job.prompts, job.config)


def eager(job: Job) -> list[Result]:
    """Decode as `ours` does, without CUDA graphs."""
    return ours(replace(job, config=job.config.replace(graphs=False)))


def once(job: Job) -> list[Result]:
    """Decode by an engine for this call."""
    return decode_once(job.loaded, job.prompts, job.config)


def naive(job: Job) -> list[Result]:
    return [Result.of(answer) for answer in _one_by_one(naive_decode, job)]


def cached(job: Job) -> list[Result]:
    return _one_by_one(cached_decode, job)


def batched(job: Job) -> list[Result]:
    rows = BATCHED_ROWS.get(len(job.prompts), 3 * len(job.prompts))
    return batched_decode(job.model, job.rm, job.prompts, job.config, rows, job.keys, job.seeded)


def plain(job: Job) -> list[Result]:
    """Decode by `generate` alone: no reward, no rejection."""
    results = []
    for prompt in job.prompts:
        ids = torch.tensor([prompt], device=job.model.device)
        with torch.inference_mode():
            output = job.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=job.config.max_new_tokens,
                eos_token_id=None,
                **generate_options(job.config),
            )
        results.append(Result(output[0, len(prompt) :].tolist()))
    return results


CONTESTANTS: dict[str, Callable[[Job], list[Result]]] = {
    "naive": naive, "cached": cached, "batched": batched, "ours": ours,
}  # fmt: skip
OTHERS = {**CONTESTANTS, "plain": plain, ONCE: once, "ours, eager": eager}
"""What ours may be timed against."""


def _one_by_one(decode_one: Callable[..., T], job: Job) -> list[T]:
    return [
        decode_one(job.model, job.rm, prompt, job.config, key, job.seeded)
        for prompt, key in zip(job.prompts, job.keys, strict=True)
    ]


# Check


def check_exact(device: str = "cpu") -> None:
    """Check that in float64, where rounding tips no choice, all give the same tokens after the same attempts."""
    loaded = models.load("tiny", prompts=3, dtype=torch.float64, device=device)
    config = StarsConfig(max_new_tokens=22, eos_token_id=(), seed=7, progress=False)
    job = Job(loaded, loaded.prompts, scripted(config, 5, prompts=3), seeded=True)
    _compare("scripted", job)
    # Real rewards: soft acceptance at a rising threshold, and few enough attempts for fallbacks.
    soft = config.replace(
        segment_size=5,
        max_attempts=5,
        alpha=0.1,
        reward_threshold=1.5,
        beta=0.5,
        temperature=1.5,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
    )
    _compare("soft", replace(job, config=soft))


def _compare(what: str, job: Job) -> None:
    results = {name: contestant(job) for name, contestant in CONTESTANTS.items()}
    results[ONCE] = once(job)
    results["ours, width 3"] = ours(replace(job, config=job.config.replace(width=3)))
    expected = results["naive"]
    for name, given in results.items():
        for p, (a, b) in enumerate(zip(given, expected, strict=True)):
            if (a.token_ids, a.attempts) != (b.token_ids, b.attempts):
                raise CheckError(f"{what}: {name} and naive differ in float64 at prompt {p}:\n{a}\n{b}")


def check_graphs(device: str) -> None:
    """Check that graphs change no token, attempt or reward in float32.

    4 and 8 rows are never padded, so that both multiply matrices of the same shapes.
    """
    job = make_job("tiny", prompts=2, device=device)
    job = replace(job, config=job.config.replace(width=4))
    expected = eager(job)
    with job.loaded.engine.open_run(job.prompts, config=job.config, request_ids=range(2)) as run:
        for _ in run.rounds():
            pass
        captured, proposer = [Result.of(answer) for answer in run.answers], run.round.proposer
        graphs = proposer.graphs if isinstance(proposer, ModelProposer) else None
    if graphs is None or not graphs.counts.replays:
        raise CheckError("no segment was replayed from a CUDA graph")
    if captured != expected:
        raise CheckError(f"CUDA graphs and eager segments differ in float32:\n{captured}\n{expected}")


def agreement(job: Job) -> dict[str, float]:
    """Return the share of each contestant's tokens before its first difference from the naive loop.

    The job runs in its own dtype, where rounding may tip a choice.
    """
    job = replace(job, seeded=True)
    expected = [result.token_ids for result in naive(job)]
    shares = {}
    for name in ("ours", "cached", "batched"):
        given = [result.token_ids for result in CONTESTANTS[name](job)]
        shares[name] = sum(map(_common_prefix, given, expected)) / sum(map(len, expected))
        print(f"  {name}: {shares[name]:.0%} of the tokens come before the first difference", flush=True)
    return shares


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


# Time


def timed(name: str, work: Callable[[], list[Result]], device: torch.device) -> tuple[float, list[Result]]:
    wait(device)
    began = time.perf_counter()
    results = work()
    wait(device)
    seconds = time.perf_counter() - began
    print(f"  {name}: {seconds:.2f} s", flush=True)
    return seconds, results


@dataclass(frozen=True)
class Pair:
    """Seconds per segment of one prompt."""

    mine: float
    theirs: float


def interleaved(job: Job, others: dict[str, Job]) -> dict[str, Pair]:
    """Time each of the others on its own job, between two runs of ours on `job`, whose mean it is compared with.

    A shared machine drifts, so only neighbours in time are compared. The naive loop's time is proportional to its
    attempts: it is charged MEAN_ATTEMPTS of them a segment.
    """
    device = job.model.device
    mine = [timed("ours", partial(ours, job), device)[0] / job.segments]
    pairs = {}
    for name, other in others.items():
        seconds, results = timed(name, partial(OTHERS[name], other), device)
        theirs = seconds / other.segments
        if name == "naive":
            theirs = seconds * MEAN_ATTEMPTS / sum(sum(result.attempts) for result in results)
        mine.append(timed("ours", partial(ours, job), device)[0] / job.segments)
        pairs[name] = Pair(statistics.mean(mine[-2:]), theirs)
    return pairs


def overhead(job: Job) -> tuple[float, list[Forward]]:
    """Return the share of our time that lies outside of the models' forwards, and these."""
    with counted(job.loaded) as forwards:
        seconds, _ = timed("ours, its forwards counted", partial(ours, job), job.model.device)
    return 1 - sum(forward.seconds for forward in forwards) / seconds, forwards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=models.MODELS, default="smol", help="tiny is for smoke tests")
    parser.add_argument("--rewards", choices=REWARDS, help="time only with these (default: with both)")
    parser.add_argument(
        "--prompts",
        type=whole(1),
        default=8,
        help="prompts of the batch (default 8); with 1, one prompt alone is timed",
    )


def run(args: argparse.Namespace) -> list[Row]:
    if args.device == "cuda":
        if args.rewards == "real":
            raise SystemExit("--rewards real is for the CPU: on a GPU, only scripted rewards are timed")
        return run_on_gpu(args)
    rows = []
    if args.rewards != "scripted":
        print("check real rewards in float64 ...", flush=True)
        heads.check_exact(args.model)
    if args.rewards != "real":
        rows += run_on_cpu(args)
    if args.rewards != "scripted":
        rows += heads.run(args)
    return rows


def run_on_cpu(args: argparse.Namespace) -> list[Row]:
    print("check in float64 ...", flush=True)
    check_exact()
    print(f"load {args.model} ...", flush=True)
    full = make_job(args.model, args.prompts)
    print("compare with the naive loop in float32 ...", flush=True)
    shares = agreement(full.cut(prompts=1, segments=1 if args.quick else 2))

    segments = 4 if args.quick else SEGMENTS
    one = full.cut(1, segments)
    naive_job = full.cut(1, 2) if args.quick else one
    ours(full.cut(1, 1))  # makes the engine, and warms up
    print("time, one prompt ...", flush=True)
    pairs = interleaved(one, {"naive": naive_job, **dict.fromkeys(("cached", "batched", "plain", ONCE), one)})
    share, forwards = overhead(one)
    speed = pairs["plain"]
    notes = {
        "naive": f"seconds a segment of {SEGMENT}; ours has {shares['ours']:.0%} of its tokens in float32",
        "plain": _plain_note(speed),
    }
    rows = _rows(args, "one prompt", one, pairs, forwards, notes)
    rows.append(_overhead_row(args, "one prompt", share, speed))
    if args.prompts == 1:
        return rows

    name = f"{args.prompts} prompts"
    print(f"time, {name} ...", flush=True)
    many = full.cut(args.prompts, segments)
    others = {"naive": naive_job} if args.quick else {"naive": naive_job, "batched": many}
    pairs = interleaved(many, others)
    share, forwards = overhead(many)
    notes = {"naive": "it cannot batch: its rate from one prompt"}
    rows += _rows(args, name, many, pairs, forwards, notes)
    rows.append(_overhead_row(args, name, share, pairs["naive"]))
    if args.quick:
        return rows

    tokens = LONG_PROMPT_TOKENS if args.model == "smol" else models.PROMPT_TOKENS
    name = f"{args.prompts} prompts of {tokens} tokens"
    print(f"time, {name} ...", flush=True)
    long = make_job(args.model, args.prompts, tokens)
    ours(long.cut(1, 1))  # makes the engine
    pairs = interleaved(long, {"batched": long})
    _, forwards = overhead(long)
    return rows + _rows(args, name, long, pairs, forwards, {"batched": "reading the prompts is in both times"})


def run_on_gpu(args: argparse.Namespace) -> list[Row]:
    """Time the same jobs in float32 and bfloat16, ours as CUDA graphs.

    There are no targets, and no share of time outside the forwards: the host runs ahead of them. Everything runs once
    untimed, so that no kernel is compiled or loaded on the clock. Nor are graphs captured on it, but by an engine for
    one call.
    """
    check_triton()
    print("check in float64 ...", flush=True)
    check_exact(args.device)
    print("check CUDA graphs in float32 ...", flush=True)
    check_graphs(args.device)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        what = str(dtype).removeprefix("torch.")
        print(f"load {args.model} in {what} ...", flush=True)
        full = make_job(args.model, args.prompts, dtype=dtype, device=args.device)
        print(f"compare with the naive loop in {what} ...", flush=True)
        shares = agreement(full.cut(prompts=1, segments=1 if args.quick else 2))
        segments = 4 if args.quick else SEGMENTS
        one = full.cut(1, segments)
        naive_job = full.cut(1, 2) if args.quick else one
        others = {"naive": naive_job, **dict.fromkeys(("cached", "batched", "plain", ONCE), one)}
        jobs = [("one prompt", one, others)]
        if args.prompts > 1:
            many = full.cut(args.prompts, segments)
            jobs.append((f"{args.prompts} prompts", many, {"naive": naive_job, "batched": many}))
            if not args.quick:
                tokens = LONG_PROMPT_TOKENS if args.model == "smol" else models.PROMPT_TOKENS
                long = make_job(args.model, args.prompts, tokens, dtype, args.device)
                jobs.append((f"{args.prompts} prompts of {tokens} tokens", long, {"batched": long}))
        for name, job, others in jobs:
            others["ours, eager"] = job
            print(f"warm up, {name}, {what} ...", flush=True)
            with counted(job.loaded) as forwards:
                eager(job)
            ours(job)
            for other, work in others.items():
                OTHERS[other](work)
            print(f"time, {name}, {what} ...", flush=True)
            pairs = interleaved(job, others)
            notes = {"naive": f"one prompt at a time; ours has {shares['ours']:.0%} of its tokens"}
            if "plain" in pairs:
                notes["plain"] = _plain_note(pairs["plain"])
            rows += _rows(args, f"{name}, {what}", job, pairs, forwards, notes)
    return rows


def _plain_note(speed: Pair) -> str:
    return f"generate, no reward: {SEGMENT / speed.theirs:.1f} tokens/s; ours {SEGMENT / speed.mine:.1f}"


def _rows(
    args: argparse.Namespace,
    name: str,
    job: Job,
    pairs: dict[str, Pair],
    forwards: list[Forward],
    notes: dict[str, str],
) -> list[Row]:
    floor = args.rates.floor(forwards) / job.segments
    targets = TARGETS if args.model == "smol" and args.device == "cpu" else {}
    return [
        Row(name, other, pair.theirs / pair.mine, targets.get((name, other)), pair.mine / floor, pair.mine, pair.theirs,
            notes.get(other, ""))
        for other, pair in pairs.items()
    ]  # fmt: skip


def _overhead_row(args: argparse.Namespace, name: str, overhead: float, pair: Pair) -> Row:
    """Make the row of all that is not the models' arithmetic: sampling, cache, acceptance, bookkeeping."""
    target = 1 / OVERHEAD_TARGET if args.model == "smol" else None
    note = f"{overhead:.1%} of the time lies outside the models' forwards"
    return Row(name, "itself", 1 / overhead, target, None, overhead * pair.mine, pair.mine, note)
