"""roofline: STARS decoding on GPUs by formula, a MODEL and not a measurement.

A kernel takes the larger of (bytes / bandwidth) and (operations / rate): bench/kernels.py. What a round consists of,
for this package and for vLLM: bench/rounds.py. Their constants are the assumptions, and are printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from bench.arguments import share, whole
from bench.kernels import BANDWIDTH_SHARE, FLOPS_SHARE, GPUS, L2_BYTES, MODELS, QUERY_BLOCK, RACE_FLOPS
from bench.rounds import (
    GAP_SECONDS,
    HOST_SECONDS,
    ISSUE_SECONDS,
    MAX_ATTEMPTS,
    NEW_TOKENS,
    VLLM_CPU_SECONDS,
    Choose,
    Cost,
    Job,
    best_width,
    launches,
    ours,
    perfect_seconds,
    prefill,
    round_seconds,
    rounds_seconds,
    table_width,
    vllm_seconds,
)

HEADING = "MODEL, not a measurement"
SEGMENTS = (15, 30)
KERNEL_WIDTH = 4  # of the table of kernels
WORTH = 1.05  # a fused LM head is kept from here on: `lm_head_sample`
PUBLISHED = (("STARS, segment 15", 185.0), ("STARS, segment 30", 195.0), ("CARDS", 120.5))
PUBLISHED_NOTE = (
    "Published by others, read second-hand (notes on arXiv 2511.03827): batch 64, Llama-7B or Mistral-7B with a "
    "Llama-7B reward model, HH-RLHF. Their GPU, acceptance and lengths are not known here, so no ratio is given."
)


def decoding(job: Job) -> dict[str, Any]:
    """Aligned tokens a second of each contestant, each at the width that is best for it but where said otherwise."""
    tokens = job.prompts * NEW_TOKENS

    def stars(graph: bool, fused: bool = False) -> Cost:
        return lambda *at: round_seconds(job.gpu, ours(job, *at, fused_elementwise=fused), graph)

    def vllm(rm_cached: bool) -> Cost:
        return lambda *at: vllm_seconds(job, *at, rm_cached)

    def speed(cost: Cost, begin: float, choose: Choose | None = None) -> float:
        best = choose or (lambda prompts, prefix: best_width(job, cost, prompts, prefix))
        return tokens / (begin + rounds_seconds(job, cost, best))

    begin, fused_begin = (round_seconds(job.gpu, prefill(job, fused), graph=False) for fused in (False, True))
    perfect = perfect_seconds(job.gpu, prefill(job))
    width = best_width(job, stars(True), job.prompts, job.middle)
    full = ours(job, job.prompts, width, job.middle)
    per_round = job.prompts * job.decided(width) * job.segment
    graph, fused = speed(stars(True), begin), speed(stars(True, True), fused_begin)
    rival = speed(vllm(True), perfect)
    return job.row | {
        "width": width,
        "rounds": job.rounds(width),
        "width 1": speed(stars(True), begin, lambda prompts, prefix: 1),
        "width.py": speed(stars(True), begin, lambda prompts, prefix: table_width(job, prompts)),
        "eager": speed(stars(False), begin),
        "graph": graph,
        "graph, fused": fused,
        "vLLM": rival,
        "RM uncached": speed(vllm(False), perfect),
        "graph/vLLM": graph / rival,
        "fused/vLLM": fused / rival,
        "launches": launches(full) / per_round,
        "with graphs": launches(full, True) / per_round,
    }


def fusion(job: Job) -> dict[str, Any]:
    """How much faster a full round at temperature alone gets where only a segment's first draw has logits stored."""

    def cost(*at: Any, fused: bool = False, draw: bool = True) -> float:
        kernels = ours(job, *at, filtered=False, fused_head=fused)
        return round_seconds(job.gpu, kernels if draw else [k._replace(vector_flops=0) for k in kernels], graph=True)

    at = (job.prompts, best_width(job, cost, job.prompts, job.middle), job.middle)
    return job.row | {
        "width": at[1],
        "stored ms": cost(*at) * 1e3,
        "fused ms": cost(*at, fused=True) * 1e3,
        "ratio": cost(*at) / cost(*at, fused=True),
        "ratio if draws were free": cost(*at, draw=False) / cost(*at, fused=True, draw=False),
    }


def kernel_rows(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Each kernel of a full round of one model, with its time on each GPU and what bounds it."""
    rows = []
    for k in ours(jobs[0], jobs[0].prompts, KERNEL_WIDTH, jobs[0].middle):
        row = {
            "kernel": k.name,
            "calls": k.calls,
            "launches/call": k.launches,
            "MB/call": k.bytes / 1e6,
            "Gflop/call": (k.flops + k.vector_flops) / 1e9,
            "MB/round": k.calls * k.bytes / 1e6,
            "Gflop/round": k.calls * (k.flops + k.vector_flops) / 1e9,
        }
        for gpu in (job.gpu for job in jobs):
            limits = k.limits(gpu)
            bound = max(limits, key=lambda what: limits[what]) if any(limits.values()) else "launch"
            row |= {f"{gpu.name} ms": k.seconds(gpu) * 1e3, f"{gpu.name} bound": bound}
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


def assumptions(args: argparse.Namespace) -> list[str]:
    return [
        f"{args.prompts} prompts of {args.prompt_tokens} tokens in lock-step, answers of {NEW_TOKENS} that do not end "
        "early; from the first prompt token read to the last answer done, with no new prompts in between",
        f"an attempt is accepted with probability {args.acceptance:g} (a mean of {1 / args.acceptance:.3g} attempts), "
        f"whatever the segment; after {MAX_ATTEMPTS} the best is taken",
        "the reward model is as large as the language model, both in bf16 on one GPU; draws with top-k and top-p",
        f"{BANDWIDTH_SHARE:.0%} of the datasheet's bandwidth, {FLOPS_SHARE:.0%} of its dense rates; activations that "
        f"fit {L2_BYTES / 1e6:.0f} MB of L2 cost no bandwidth; a draw costs {RACE_FLOPS} fp32 operations a candidate",
        f"a launch takes the host {ISSUE_SECONDS * 1e6:.0f} us, while the GPU works on, and the GPU "
        f"{GAP_SECONDS * 1e6:.0f} us, in a CUDA graph too; {HOST_SECONDS * 1e3:.0f} ms a round for bookkeeping",
        "a round has three phases, as built: last tokens of the segments before, the segment, the reward model with "
        "decisions and commits. The host is taken to wait at the end of each and to issue ahead inside a phase alone "
        "(as built it waits once a round: no credit is given for that); a CUDA graph holds the segment, the other two "
        "are issued launch by launch",
        f"fork_attention reads a prefix once for {QUERY_BLOCK} queries of its prompt (rows x tokens x heads of a "
        "group), so more than once where a segment is scored; what L2 saves of that is not counted",
        "element-wise kernels are transformers' own, one at a time; in `graph, fused` four a layer",
        "everybody takes the width of the lowest modelled time per decided segment, at each number of prompts left; "
        "`width.py` takes that of stars_kernels/decoder/width.py, a fixed table made for a CPU",
        "vLLM: prefix caching, a request of `width` samples per prompt and segment, attention reads a prefix once a "
        "row (cascade is off by default), a part of a block is read again by each row; a second engine for rewards, "
        "with prefix caching or without",
        "in vLLM's favour: perfect CUDA graphs, element-wise kernels for nothing, our sampler, our bookkeeping, and "
        f"{VLLM_CPU_SECONDS * 1e3:.0f} ms of CPU a step (2 to 5 are reported), hidden behind the GPU where it can be",
        "this package takes Llama only: Qwen2.5 stands for a small model with a large vocabulary",
    ]


def cell(value: Any) -> str:
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "(nothing fits)"
    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ("  ".join(entry.ljust(width) for entry, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in text)


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    def where(column: str) -> str:
        worth = [f"{row['model']} on {row['gpu']}, segment {row['segment']}" for row in rows if row[column] >= WORTH]
        return "; ".join(worth) or "nowhere"

    return (
        f"Verdict: {WORTH}x or more, at best: {where('ratio')}.\n"
        f"If draws were free, so that only bytes are saved: {where('ratio if draws were free')}."
    )


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


def run(args: argparse.Namespace) -> int:
    jobs = [
        Job(GPUS[gpu], MODELS[model], args.prompts, args.prompt_tokens, segment, args.acceptance)
        for gpu in args.gpu for model in args.model for segment in SEGMENTS
    ]  # fmt: skip
    fitting = [job for job in jobs if job.widths]
    too_large = [
        f"{job.model.name} on {job.gpu.name}, segment {job.segment}: {job.memory(1) / 1e9:.0f} GB"
        for job in jobs if not job.widths
    ]  # fmt: skip
    report: dict[str, Any] = {"heading": HEADING, "assumptions": assumptions(args), "kernels": {}}
    print(f"{HEADING}. Nothing below was timed, and nothing in this package has ever run on a GPU.\n\nAssumed:")
    print("\n".join(f"- {line}" for line in report["assumptions"]))

    for name, segment in dict.fromkeys((job.model.name, job.segment) for job in jobs):
        one = [job for job in jobs if (job.model.name, job.segment) == (name, segment)]
        report["kernels"][f"{name}, segment {segment}"] = rows = kernel_rows(one)
        shape = f"{args.prompts} prompts, width {KERNEL_WIDTH}, segment {segment}, prefix {one[0].middle:.0f}"
        print(f"\n{HEADING}: kernels of a round, {name}, {shape}\n{table(rows)}")

    report["decoding"] = rows = [decoding(job) for job in fitting]
    print(
        f"\n{HEADING}: aligned tokens a second, {args.prompts} prompts; launches a token in a full round\n{table(rows)}"
    )
    report["too large"] = too_large
    print("\n".join(f"Does not fit: {line}" for line in too_large), end="\n" if too_large else "")
    report["published"] = {"note": PUBLISHED_NOTE, "tokens a second": dict(PUBLISHED)}
    print(f"\n{PUBLISHED_NOTE}")
    print("\n".join(f"- {name}: {speed} tokens/s (published)" for name, speed in PUBLISHED))

    report["fusion"] = rows = [fusion(job) for job in fitting]
    report["verdict"] = verdict(rows)
    print(
        f"\n{HEADING}: LM head and draw in one op, none but a first token's logits stored (temperature alone, graphs)"
    )
    print(f"{table(rows)}\n{report['verdict']}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0
