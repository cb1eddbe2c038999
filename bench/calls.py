"""calls: what a short answer costs beside its rounds, by `stars_kernels.decode` and by a living engine."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from transformers.utils.logging import disable_progress_bar

from bench import models
from bench.common import check_triton
from bench.decode import SEGMENT, make_job
from bench.machine import wait
from bench.report import CheckError
from demo.arguments import whole
from stars_kernels import StarsOutput, decode

TARGET = 0.03
"""Share of set-up in a later call of an engine, at most, with the model `smol` on a CPU."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a call; of these, `setup` are not spent on reading the prompt or in a part of a round."""

    name: str
    seconds: float
    setup: float

    @property
    def share(self) -> float:
        return self.setup / self.seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=models.MODELS, default="smol", help="tiny is for smoke tests")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it all runs (default cpu)")
    parser.add_argument("--tokens", type=whole(1), default=SEGMENT, help=f"of the answer (default {SEGMENT})")
    parser.add_argument("--calls", type=whole(1), default=5, help="later ones, whose median counts (default 5)")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns 1 where two calls give different answers."""
    disable_progress_bar()  # of loading
    if args.device == "cuda":
        check_triton()
    try:
        costs = measure(args.model, args.device, args.tokens, args.calls)
    except CheckError as error:
        print(f"CHECK FAILED: {error}")
        return 1
    print(table(costs))
    if args.model == "smol" and args.device == "cpu" and costs[-1].share > TARGET:
        print(f"\nMISSED: {costs[-1].name}: {costs[-1].share:.1%} is set-up, target {TARGET:.0%}")
    return 0


def measure(model: str, device: str, tokens: int, calls: int) -> list[Cost]:
    """Time the same request: first by `stars_kernels.decode`, in a process that has decoded nothing before."""
    job = make_job(model, prompts=1, device=device)
    (prompt,), config, loaded = job.prompts, job.config.replace(max_new_tokens=tokens), job.loaded
    answers: list[list[int]] = []

    def by_decode() -> StarsOutput:
        return decode(loaded.model, loaded.rm, prompt, config=config, request_ids=0)

    def by_engine() -> StarsOutput:
        return loaded.engine.decode(prompt, config=config, request_ids=0)

    def cost(name: str, work: Callable[[], StarsOutput], count: int) -> Cost:
        seconds, setup = [], []
        for _ in range(count):
            wait(job.model.device)
            began = time.perf_counter()
            output = work()
            seconds.append(time.perf_counter() - began)
            setup.append(seconds[-1] - sum(output.seconds.values()))
            answers.append(output.token_ids)
        return Cost(name, statistics.median(seconds), statistics.median(setup))

    costs = [
        cost("stars_kernels.decode, first call", by_decode, 1),
        cost("stars_kernels.decode, later calls", by_decode, calls),
        cost("an engine's first call, in which it is made", by_engine, 1),
        cost("an engine's later calls", by_engine, calls),
    ]
    if any(answer != answers[0] for answer in answers):
        raise CheckError(f"calls give different answers: {answers}")
    return costs


def table(costs: list[Cost]) -> str:
    lines = ["| call | s | set-up, s | set-up, share |", "|---|---|---|---|"]
    lines += [f"| {c.name} | {c.seconds:.3g} | {c.setup:.3g} | {c.share:.1%} |" for c in costs]
    return "\n".join(lines)
