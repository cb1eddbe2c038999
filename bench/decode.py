"""decode: ours against hand-written loops, for one prompt and for several."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
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
from bench.ours import ours_decode, segment_graphs
from bench.report import CheckError, Row
from demo.arguments import whole
from demo.naive import Judge, generate_options, naive_decode
from stars_kernels import StarsConfig, decode
from stars_kernels.hf.proposing.graphs import SegmentGraphs
from stars_kernels.ops.philox import request_key

T = TypeVar("T")

SEGMENT = 15
SEGMENTS = 8
MEAN_ATTEMPTS = 4
ATTEMPTS = (3, 5, 7, 1, 2, 11, 1, 2)
"""The attempt that is accepted, segment by segment; each prompt starts at another place.

The mean is exactly 4, also over the first two, the first four, and eight prompts of any number of segments.
The spread is that of a geometric distribution, as for a reward model that takes one attempt in four.
"""
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


def script(prompt: int) -> Judge:
    """Reward 1 for the attempt that the pattern accepts, 0 for the others, whatever the reward model says."""

    def judge(segment: int, attempt: int, reward: float) -> float:
        return float(attempt == ATTEMPTS[(prompt + segment) % len(ATTEMPTS)] - 1)

    return judge


@dataclass(frozen=True)
class Job:
    """What a contestant has to do: all prompts, each to the end of the budget."""

    model: PreTrainedModel
    rm: PreTrainedModel
    prompts: list[list[int]]
    config: StarsConfig
    scripted: bool = True
    seeded: bool = False
    """Draw the engine's tokens, for the check; else the contestants draw as transformers does."""

    @property
    def keys(self) -> list[int]:
        assert self.config.seed is not None
        return [request_key(self.config.seed, p) for p in range(len(self.prompts))]

    @property
    def judges(self) -> list[Judge] | None:
        return [script(p) for p in range(len(self.prompts))] if self.scripted else None

    @property
    def segments(self) -> int:
        """Of all prompts together."""
        return len(self.prompts) * -(-self.config.max_new_tokens // self.config.segment_size)

    def cut(self, prompts: int, segments: int) -> Job:
        config = self.config.replace(max_new_tokens=segments * self.config.segment_size)
        return replace(self, prompts=self.prompts[:prompts], config=config)


def make_job(
    model_name: str,
    prompts: int,
    prompt_tokens: int = models.PROMPT_TOKENS,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Job:
    loaded = models.load(model_name, prompts, dtype, prompt_tokens, device)
    config = StarsConfig(
        segment_size=SEGMENT, max_new_tokens=SEGMENT * SEGMENTS, temperature=1.0, top_k=40, seed=0,
        eos_token_id=(), accept="hard", alpha=1.0, reward_threshold=0.5, beta=1.0,
    )  # fmt: skip
    return Job(loaded.model, loaded.rm, loaded.prompts, config)


# The contestants: each does the whole job


def ours(job: Job, forwards: list[Forward] | None = None, graphs: SegmentGraphs | None = None) -> list[Result]:
    graphs = graphs or segment_graphs(job.model, job.config)
    return ours_decode(job.model, job.rm, job.prompts, job.config, job.keys, job.judges, forwards, graphs)


def eager(job: Job, forwards: list[Forward] | None = None) -> list[Result]:
    """Decode as `ours` does, without CUDA graphs."""
    return ours(replace(job, config=job.config.replace(graphs=False)), forwards)


def naive(job: Job) -> list[Result]:
    return [Result.of(answer) for answer in _one_by_one(naive_decode, job)]


def cached(job: Job) -> list[Result]:
    return _one_by_one(cached_decode, job)


def batched(job: Job) -> list[Result]:
    rows = BATCHED_ROWS.get(len(job.prompts), 3 * len(job.prompts))
    return batched_decode(job.model, job.rm, job.prompts, job.config, rows, job.keys, job.judges, job.seeded)


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
OTHERS = {**CONTESTANTS, "plain": plain, "ours, eager": eager}
"""What ours may be timed against."""


def _one_by_one(decode_one: Callable[..., T], job: Job) -> list[T]:
    judges: Sequence[Judge | None] = job.judges or [None] * len(job.prompts)
    return [
        decode_one(job.model, job.rm, prompt, job.config, key, judge, job.seeded)
        for prompt, key, judge in zip(job.prompts, job.keys, judges, strict=True)
    ]


# Check


def check_exact(device: str = "cpu") -> None:
    """Check that in float64, where rounding tips no choice, all give the same tokens after the same attempts."""
    loaded = models.load("tiny", prompts=3, dtype=torch.float64, device=device)
    config = StarsConfig(segment_size=5, max_new_tokens=22, eos_token_id=(), seed=7, progress=False)
    scripted = config.replace(accept="hard", alpha=1.0, reward_threshold=0.5, beta=1.0)
    _compare("scripted", Job(loaded.model, loaded.rm, loaded.prompts, scripted, seeded=True))
    # Real rewards: soft acceptance at a rising threshold, and few enough attempts for fallbacks.
    soft = config.replace(
        max_attempts=5,
        alpha=0.1,
        reward_threshold=1.5,
        beta=0.5,
        temperature=1.5,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
    )
    job = Job(loaded.model, loaded.rm, loaded.prompts, soft, scripted=False, seeded=True)
    expected = _compare("soft", job)
    outputs = decode(job.model, job.rm, job.prompts, config=soft, request_ids=range(len(job.prompts)))
    assert isinstance(outputs, list)
    if [output.token_ids for output in outputs] != [result.token_ids for result in expected]:
        raise CheckError("soft: stars_kernels.decode and the naive loop give different tokens in float64")


def _compare(what: str, job: Job) -> list[Result]:
    results = {name: contestant(job) for name, contestant in CONTESTANTS.items()}
    results["ours, width 3"] = ours(replace(job, config=job.config.replace(width=3)))
    expected = results["naive"]
    for name, given in results.items():
        for p, (a, b) in enumerate(zip(given, expected, strict=True)):
            if (a.token_ids, a.attempts) != (b.token_ids, b.attempts):
                raise CheckError(f"{what}: {name} and naive differ in float64 at prompt {p}:\n{a}\n{b}")
    return expected


def check_graphs(device: str) -> None:
    """Check that graphs change no token and no attempt in float32.

    4 and 8 rows are never padded, so that both multiply matrices of the same shapes.
    """
    job = make_job("tiny", prompts=2, device=device)
    job = replace(job, config=job.config.replace(width=4))
    graphs = segment_graphs(job.model, job.config)
    captured, expected = ours(job, graphs=graphs), eager(job)
    if graphs is None or not graphs.replays:
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


def interleaved(
    job: Job, others: dict[str, Job], forwards: list[Forward] | None = None
) -> tuple[dict[str, Pair], float]:
    """Time each of the others on its own job, between two runs of ours on `job`, whose mean it is compared with.

    A shared machine drifts, so only neighbours in time are compared. The naive loop's time is proportional to its
    attempts: it is charged MEAN_ATTEMPTS of them a segment. forwards: gets those of our first run, whose share of time
    outside of them is returned too.
    """
    device = job.model.device
    seconds = timed("ours", partial(ours, job, forwards), device)[0]
    overhead = 1 - sum(forward.seconds for forward in forwards or []) / seconds
    mine = [seconds / job.segments]
    pairs = {}
    for name, other in others.items():
        seconds, results = timed(name, partial(OTHERS[name], other), device)
        theirs = seconds / other.segments
        if name == "naive":
            theirs = seconds * MEAN_ATTEMPTS / sum(sum(result.attempts) for result in results)
        mine.append(timed("ours", partial(ours, job), device)[0] / job.segments)
        pairs[name] = Pair(statistics.mean(mine[-2:]), theirs)
    return pairs, overhead


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
    ours(full.cut(1, 1))  # warms up
    print("time, one prompt ...", flush=True)
    forwards: list[Forward] = []
    pairs, overhead = interleaved(one, {"naive": naive_job, "cached": one, "batched": one, "plain": one}, forwards)
    speed = pairs["plain"]
    notes = {
        "naive": f"seconds a segment of {SEGMENT}; ours has {shares['ours']:.0%} of its tokens in float32",
        "plain": _plain_note(speed),
    }
    rows = _rows(args, "one prompt", one, pairs, forwards, notes)
    rows.append(_overhead_row(args, "one prompt", overhead, speed))
    if args.prompts == 1:
        return rows

    name = f"{args.prompts} prompts"
    print(f"time, {name} ...", flush=True)
    many = full.cut(args.prompts, segments)
    others = {"naive": naive_job} if args.quick else {"naive": naive_job, "batched": many}
    forwards = []
    pairs, overhead = interleaved(many, others, forwards)
    notes = {"naive": "it cannot batch: its rate from one prompt"}
    rows += _rows(args, name, many, pairs, forwards, notes)
    rows.append(_overhead_row(args, name, overhead, pairs["naive"]))
    if args.quick:
        return rows

    tokens = LONG_PROMPT_TOKENS if args.model == "smol" else models.PROMPT_TOKENS
    name = f"{args.prompts} prompts of {tokens} tokens"
    print(f"time, {name} ...", flush=True)
    long = make_job(args.model, args.prompts, tokens)
    forwards = []
    pairs, _ = interleaved(long, {"batched": long}, forwards)
    return rows + _rows(args, name, long, pairs, forwards, {"batched": "reading the prompts is in both times"})


def run_on_gpu(args: argparse.Namespace) -> list[Row]:
    """Time the same jobs in float32 and bfloat16, ours as CUDA graphs.

    There are no targets, and no share of time outside the forwards: the host runs ahead of them. Everything runs once
    untimed, so that no kernel is compiled or loaded on the clock; capturing the graphs is on it.
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
        jobs = [("one prompt", one, {"naive": naive_job, "cached": one, "batched": one, "plain": one})]
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
            forwards: list[Forward] = []
            eager(job, forwards)
            ours(job)
            for other, work in others.items():
                OTHERS[other](work)
            print(f"time, {name}, {what} ...", flush=True)
            pairs, _ = interleaved(job, others)
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
