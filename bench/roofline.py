"""roofline: STARS decoding on GPUs by formula, a MODEL and not a measurement.

A kernel takes the larger of (bytes / bandwidth) and (operations / rate): bench/kernels.py. What a round consists of:
bench/costs.py for this package, bench/rivals.py for vLLM. Every constant of the machine is in bench/assumptions.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench import costs, counted, kernels, parts, rivals, schedule, sizes
from bench.assumptions import CODE, ELSEWHERE, ESTIMATE, listed, values
from bench.costs import ours
from bench.kernels import L2_BYTES, QUERY_BLOCK, RACE_FLOPS
from bench.parts import MISSING, PARTS, with_parts
from bench.rivals import RIVALS, Rival
from bench.schedule import MAX_ATTEMPTS, NEW_TOKENS, Job
from bench.sizes import GPUS, MODELS
from bench.tables import bullets, cell, table
from bench.variants import (
    ALL_PARTS,
    BUILT_AS,
    Band,
    Batch,
    Contestant,
    a_call,
    contestants,
    one_batch,
    ours_as,
    rival,
    tokens,
)
from demo.arguments import output_file, share, whole

HEADING = "MODEL, not a measurement"
SEGMENTS = (15, 30)
KERNEL_WIDTH = 4  # of the table of kernels
RATIOS = (  # (ours, rival)
    ("first call", "vLLM, waves"),
    ("shipped", "vLLM, waves"),
    ("tuned", "vLLM, waves"),
    ("tuned", "vLLM, waves, L2"),
    ("tuned", "vLLM, waves, requests"),
    (ALL_PARTS, "vLLM, waves"),
    (ALL_PARTS, "vLLM, waves, L2"),
)
GOALS = {("Llama-3-8B", 64): 1.3, ("Qwen2.5-0.5B", 64): 1.25, ("Llama-3-8B", 1): 1.0, ("Qwen2.5-0.5B", 1): 1.5}
"""Ratios to vLLM that are aimed at on `GOAL_GPU` with segments of `GOAL_SEGMENT`, by model and prompts."""
GOAL_GPU, GOAL_SEGMENT = "h100", 15
CONSTANTS = (  # (module, names, source)
    (
        counted,
        tuple(name for name in vars(counted) if name.isupper()),
        "counted: bench/counted.py, by tests/test_launches.py",
    ),
    (parts, ("OUTSIDE",), f"{ESTIMATE}: of parts that are not built"),
    (sizes, ("MERGE_SHARE",), f"{CODE}: hf/view/rewrites/merged.py"),
    (
        kernels,
        ("QUERY_BLOCK", "SPLIT_KEYS", "MAX_SPLITS", "TARGET_PROGRAMS", "WHOLE_SPLITS", "WORKSPACE"),
        f"{CODE}: triton/fork_attention.py",
    ),
    (kernels, ("CHUNK", "GROUP", "HEAD_BLOCK"), f"{CODE}: triton/segment_sample.py, triton/lm_head_sample.py"),
    (kernels, ("SURVIVORS", "RACE_FLOPS", "FILTER_FLOPS"), f"{ESTIMATE}: candidates a row, operations a candidate"),
    (kernels, ("L2_BYTES",), f"{ELSEWHERE}: an A100's datasheet, taken for all"),
    (costs, ("PREFILL_TOKENS", "PREFILL_PIECES"), f"{CODE}: hf/cache/prefill.py"),
    (schedule, ("MAX_ATTEMPTS",), f"{CODE}: the default of StarsConfig"),
    (schedule, ("WIDTHS",), f"{CODE}: decoder/width.py"),
    (schedule, ("WAVES",), f"{ESTIMATE}: the columns of a wave that are tried here, beside all"),
    (schedule, ("BATCH_SHARE",), f"{CODE}: hf/sizing.py"),
    (schedule, ("NEW_TOKENS", "MEMORY_SHARE"), f"{ESTIMATE}: of the job"),
    (rivals, ("BLOCK",), f"{ELSEWHERE}: vLLM's default"),
)
PUBLISHED = (("STARS, segment 15", 185.0), ("STARS, segment 30", 195.0), ("CARDS", 120.5))
PUBLISHED_NOTE = (
    "Published by others, read second-hand (notes on arXiv 2511.03827): batch 64, Llama-7B or Mistral-7B with a "
    "Llama-7B reward model, HH-RLHF. Their GPU, acceptance and lengths are not known here, so no ratio is given."
)


def speeds(job: Job, found: dict[str, Contestant]) -> dict[str, Any]:
    """Aligned tokens a second of each contestant, as a band."""
    return job.row | {name: contestant.band for name, contestant in found.items()}


def ratios(job: Job, found: dict[str, Contestant]) -> dict[str, Any]:
    """Of speeds, as bands."""
    return job.row | {f"{mine} / {rival}": found[mine].against(found[rival]) for mine, rival in RATIOS}


def stages(jobs: Sequence[Job]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The way to `GOALS`, part by part: speed over a vLLM that scores in waves too, and launches for an accepted token.

    Rows: the engine as built, then with each part that is not built beside those above it.
    """
    calls = {"built: default settings": [a_call(job, "shipped") for job in jobs]}
    calls["built: best width and waves"] = [a_call(job, "tuned") for job in jobs]
    for count, name in enumerate(MISSING, start=1):
        calls[f"+ not built: {name}"] = [one_batch(job, engine=with_parts(count)) for job in jobs]

    def speed(of: Sequence[Batch], rival_: Rival) -> list[Band]:
        return [ours_as(job, "", call).against(rival(job, rival_)) for job, call in zip(jobs, of, strict=True)]

    def launched(job: Job, call: Batch) -> str:
        return " / ".join(cell(n / tokens(job)) for n in call.launched)

    by_name = {r.name: r for r in RIVALS}
    rows = {name: speed(of, by_name["vLLM, waves"]) for name, of in calls.items()}
    last = next(reversed(calls))
    rows["the last row, prefixes from L2 for vLLM"] = speed(calls[last], by_name["vLLM, waves, L2"])
    rows["aimed at"] = [GOALS[job.model.name, job.prompts] for job in jobs]
    without_graphs = {"built: no graphs": [a_call(job, "eager") for job in jobs]}
    counts = {name: map(launched, jobs, of) for name, of in (without_graphs | calls).items()}

    def named(rows: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
        columns = [f"{job.model.name} x {job.prompts}" for job in jobs]
        return [{"engine": name, **dict(zip(columns, row, strict=True))} for name, row in rows.items()]

    return named(rows), named(counts)


def is_aimed_at(job: Job) -> bool:
    return (job.gpu, job.segment) == (GPUS[GOAL_GPU], GOAL_SEGMENT) and (job.model.name, job.prompts) in GOALS


def calls(job: Job) -> list[dict[str, Any]]:
    """Where the seconds of a call go, and what it launches for a token of an answer."""
    rows = []
    for name in (*BUILT_AS, ALL_PARTS):
        call = a_call(job, name)
        spent = call.seconds(values())
        run, issued = call.launched
        rows.append(
            job.row
            | {"contestant": name, "prompts": job.prompts}
            | call.counts
            | {
                "prefill s": spent.prefill,
                "rounds s": spent.rounds,
                "captures s": spent.captures,
                "captures": f"{spent.captures / spent.total:.0%}",
                "launches per accepted token": run / tokens(job),
                "of these by the host": issued / tokens(job),
            }
        )
    return rows


def kernel_rows(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Each kernel of a full round of one model, with its floor on each GPU, what bounds it, and its modelled time."""
    rows, given = [], values()
    for k in ours(jobs[0], jobs[0].prompts, KERNEL_WIDTH, jobs[0].middle):
        row = {
            "kernel": k.name,
            "calls": k.calls,
            "launches/call": k.launches,
            "MB/round": k.calls * k.bytes / 1e6,
            "Gflop/round": k.calls * (k.flops + k.vector_flops) / 1e9,
        }
        for gpu in (job.gpu for job in jobs):
            limits = k.limits(gpu, given)
            bound = max(limits, key=lambda what: limits[what]) if any(limits.values()) else "launch"
            row |= {
                f"{gpu.name} floor us/call": max(limits.values()) * 1e6,
                f"{gpu.name} bound": bound,
                f"{gpu.name} ms": k.seconds(gpu, given) * 1e3,
            }
        rows.append(row)
    return [*rows, total(rows)]


def total(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of a round: bytes, operations, seconds."""
    summed = ("MB/round", "Gflop/round")
    return {
        name: "total"
        if name == "kernel"
        else sum(row[name] for row in rows)
        if name in summed or name.endswith(" ms")
        else ""
        for name in rows[0]
    }


# Report


def conditions(args: argparse.Namespace) -> list[str]:
    """What is assumed beside the numbers of bench/assumptions.py."""
    return [
        f"{args.prompts} prompts of {args.prompt_tokens} tokens in lock-step, answers of {NEW_TOKENS} that do not end "
        "early; from the first prompt token read to the last answer done, with no new prompts in between",
        f"an attempt is accepted with probability {args.acceptance:g} (a mean of {1 / args.acceptance:.3g} attempts), "
        f"whatever the segment; after {MAX_ATTEMPTS} the best is taken",
        "the reward model is as large as the language model, both in bf16 on one GPU; draws with top-k and top-p; "
        "everything that Triton compiles has been compiled before",
        f"activations that fit {L2_BYTES / 1e6:.0f} MB of L2 cost no bandwidth; a draw costs {RACE_FLOPS} fp32 "
        "operations a candidate",
        "a kernel takes the p-norm of its limits: the larger one where they are far apart, `ridge` times it where two "
        "are equal; no launch is shorter than `small_kernel_seconds`",
        "a round has three phases, as built: last tokens of the segments before, the segment, the reward model with "
        "decisions and commits. The host is taken to wait at the end of each and to issue ahead inside a phase alone "
        "(as built it waits once a round: no credit is given for that); forwards are CUDA graphs, padded to their "
        "buckets, what lies around them is issued launch by launch",
        "a round that the device judges is in one wave, its judgement is a graph, and the host's work hides behind the "
        "GPU's; that the host waits in the last segment of a lone prompt is not counted",
        "memory and graphs outlive a call: in an engine's first call a bucket's graphs are captured (the host issues "
        "every launch of them) and replayed; later calls replay what is there",
        "a program of its own for the suffixes in fork_attention moves no byte here, as a block of queries reads the "
        "suffixes of its rows alone: what latency it saves lies within the band of `attention_share`",
        "launches are counted in the engine itself, copies from the host among them (bench/launches.py says what "
        "cannot be seen there); those of an op follow from its shapes",
        "a prompt's prefill is packed with others: one attention call a layer",
        f"fork_attention reads a prefix once for {QUERY_BLOCK} queries of its prompt (rows x tokens x heads of a "
        "group), so more than once where rows are many or a segment is scored: again from L2",
        "everybody takes the width and the waves of the lowest modelled time per decided segment, at each number of "
        "prompts left, by the middle values; `shipped` takes those of stars_kernels/decoder/width.py, a simpler model",
        "vLLM: prefix caching, a request of `width` samples per prompt and segment, attention reads a prefix once a "
        "row (cascade is off by default), a part of a block is read again by each row; a second engine for rewards",
        "in vLLM's favour: graphs captured before, no launch costs anything, element-wise kernels for nothing, our "
        "draws without their searches, our bookkeeping, no wait of the host between waves",
        "this package takes Llama and Qwen2 in bf16 on a GPU by the same path: Qwen2.5-0.5B stands for a small model "
        "with a large vocabulary",
    ]


def constants() -> list[dict[str, Any]]:
    """The table of what has no band."""
    return [
        {"name": name, "value": f"{getattr(module, name)}".strip("(),"), "source": source}
        for module, names, source in CONSTANTS for name in names
    ]  # fmt: skip


def losses(found: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], prompts: int) -> list[str]:
    """In words: where graphs lose to none, and for each ratio where the middle is below 1."""
    if not rows:
        return []
    slower = sum(row["first call"].middle < row["eager"].middle for row in found)
    lines = [
        f"{prompts} at a time: the captures of an engine's first call make it slower than `graphs=False` in {slower} "
        f"of {len(found)} cells."
    ]
    for pair in RATIOS:
        column = " / ".join(pair)
        lost = [row for row in rows if row[column].middle < 1]
        if not lost:
            lines.append(f"{prompts} at a time, {column}: loses nowhere.")
            continue
        worst = min(lost, key=lambda row: row[column].middle)
        sure = sum(row[column].high < 1 for row in rows)
        lines.append(
            f"{prompts} at a time, {column}: loses in {len(lost)} of {len(rows)} cells, in {sure} at any end of the "
            f"band; worst {worst[column].middle:.2f} ({worst['model']} on {worst['gpu']}, segment {worst['segment']})."
        )
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu", nargs="+", choices=GPUS, metavar="GPU", default=list(GPUS), help=f"of {', '.join(GPUS)} (default: all)"
    )
    parser.add_argument(
        "--model",
        nargs="+",
        choices=MODELS,
        metavar="MODEL",
        default=list(MODELS),
        help=f"of {', '.join(MODELS)} (default: all)",
    )
    parser.add_argument(
        "--prompts", type=whole(1, 10_000), default=64, metavar="N", help="prompts in lock-step (default 64)"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=whole(1, 1_000_000),
        default=128,
        metavar="N",
        help="tokens of each prompt (default 128)",
    )
    parser.add_argument(
        "--acceptance", type=share, default=0.25, metavar="SHARE",
        help="probability that an attempt is accepted (default 0.25, a mean of 4 attempts)",
    )  # fmt: skip
    parser.add_argument("--write", type=output_file, metavar="FILE", help="write what is printed here, too")


def run(args: argparse.Namespace) -> int:
    jobs = [
        Job(GPUS[gpu], MODELS[model], args.prompts, args.prompt_tokens, segment, args.acceptance)
        for gpu in args.gpu for model in args.model for segment in SEGMENTS
    ]  # fmt: skip
    report, text = made(args, jobs)
    print(text, end="")
    if args.write:
        args.write.write_text(text)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def made(args: argparse.Namespace, jobs: Sequence[Job]) -> tuple[dict[str, Any], str]:
    """All numbers, and the document."""
    fitting = [job for job in jobs if job.widths]
    too_large = [f"{job.name}: {job.memory(1) / 1e9:.0f} GB" for job in jobs if not job.widths]
    groups = {n: [replace(job, prompts=n) for job in fitting] for n in dict.fromkeys((args.prompts, 1))}
    found = {n: [(job, contestants(job)) for job in group] for n, group in groups.items()}
    report: dict[str, Any] = {"heading": HEADING, "assumptions": listed(), "conditions": conditions(args)}
    report["decoding"] = {n: [speeds(*pair) for pair in pairs] for n, pairs in found.items()}
    report["ratios"] = {n: [ratios(*pair) for pair in pairs] for n, pairs in found.items()}
    report["losses"] = [line for n, rows in report["ratios"].items() for line in losses(report["decoding"][n], rows, n)]
    report |= {"too large": too_large, "calls": [row for job in fitting for row in calls(job)]}
    report["constants"] = constants()

    text = [
        "# Roofline",
        f"{HEADING}. Nothing below was timed, and nothing in this package has ever run on a GPU. "
        "`python -m bench roofline` prints this page: how fast decoding would be, by formula, next to a vLLM without "
        "flaw that does the same work. A ratio below 1 is a loss.",
        "`1.2 (0.9-1.5)` is a band: 1.2 by the middle of all assumptions, 0.9 and 1.5 by their slow and fast ends. "
        "In a ratio the GPU is the same for both, and what touches one of the two alone lies at opposite ends.",
    ]
    aimed = [job for group in groups.values() for job in group if is_aimed_at(job)]
    if aimed:
        report["stages"], report["launches"] = stages(aimed)
        text += [
            f"## {HEADING}: {GPUS[GOAL_GPU].name}, segments of {GOAL_SEGMENT}, speed over vLLM's",
            "A column is a model and the number of prompts decoded side by side. The rival is `vLLM, waves` of below. "
            "What is built has its launches counted in the engine; each row under it adds one part that is not built, "
            "and that is modelled alone, to those above it.",
            table(report["stages"]),
            "Launches for an accepted token: what the GPU runs / what the host issues, a graph being one.",
            table(report["launches"]),
            bullets(f"`{name}`, {'built' if part.built else 'NOT BUILT'}: {part.what}" for name, part in PARTS.items()),
        ]
    text += ["## Where we lose", bullets(report["losses"])]
    text += ["## Contestants"]
    text += [bullets(f"`{name}`: as built, {what}" for name, what in BUILT_AS.items())]
    text += [f"- `{ALL_PARTS}`: as `tuned`, and with all parts, of which NOT BUILT: {', '.join(MISSING) or 'none'}"]
    text += [bullets(f"`{one.name}`: {one.what}" for one in RIVALS)]
    for n, rows in report["ratios"].items():
        text += [f"## {HEADING}: speed over the rival's, prompts: {n}", table(rows)]
    for n, rows in report["decoding"].items():
        text += [f"## {HEADING}: aligned tokens a second, prompts: {n}", table(rows)]
    text += [bullets(f"Does not fit: {line}" for line in too_large)]
    text += [f"## {HEADING}: a call, where its seconds go and what it launches", table(report["calls"])]
    text += ["## Assumptions", table(report["assumptions"]), table(report["constants"]), bullets(report["conditions"])]

    report["kernels"] = {}
    for name, segment in dict.fromkeys((job.model.name, job.segment) for job in jobs):
        same = [job for job in jobs if (job.model.name, job.segment) == (name, segment)]
        report["kernels"][f"{name}, segment {segment}"] = rows = kernel_rows(same)
        shape = f"{args.prompts} prompts, width {KERNEL_WIDTH}, segment {segment}, prefix {same[0].middle:.0f}"
        text += [f"## {HEADING}: kernels of a round, {name}, {shape}", table(rows)]
    report["published"] = {"note": PUBLISHED_NOTE, "tokens a second": dict(PUBLISHED)}
    text += ["## Published by others", PUBLISHED_NOTE]
    text += [bullets(f"{name}: {speed} tokens/s (published)" for name, speed in PUBLISHED)]
    return report, "\n\n".join(filter(None, text)) + "\n"
