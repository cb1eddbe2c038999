"""neighbour: what a decode loses where another process is busy on one of two cores.

Runs alone and beside the neighbour take turns, and give the same answers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from bench import machine, models
from bench.common import Result
from bench.decode import Job, make_job, ours, timed
from bench.report import CheckError, Row, missed_targets, table
from demo.arguments import whole

TARGET = 0.35
"""Of the speed alone: one core of two would give half, or less where threads wait for each other."""
SEGMENTS = 4
SPIN = "while True: pass"


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Other processes that compute without end, each on one core at a time."""
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def run(job: Job, processes: int, runs: int, target: float | None = TARGET) -> Row:
    """Time a segment beside the neighbour against one alone, as one row; the tokens must be the same."""
    expected = ours(job)  # warms up
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(runs):
        alone.append(checked("alone", job, expected))
        with busy(processes):
            beside.append(checked("beside the neighbour", job, expected))
    seconds, seconds_alone = (statistics.median(column) / job.segments for column in (beside, alone))
    note = f"beside: {min(beside) / job.segments:.2f} to {max(beside) / job.segments:.2f} s a segment in {runs} runs"
    name = f"{processes} of {os.cpu_count()} cores taken"
    return Row(name, "alone", seconds_alone / seconds, target, None, seconds, seconds_alone, note)


def checked(name: str, job: Job, expected: list[Result]) -> float:
    seconds, results = timed(name, partial(ours, job), job.model.device)
    if results != expected:
        raise CheckError(f"{name}: other answers than before:\n{results}\n{expected}")
    return seconds


def parse(arguments: list[str]) -> argparse.Namespace:
    cores = os.cpu_count() or 2
    parser = argparse.ArgumentParser(prog="python -m bench.neighbour", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=models.MODELS, default="smol", help="tiny is for smoke tests")
    parser.add_argument("--runs", type=whole(1), default=5, help="of each kind, whose median counts (default 5)")
    parser.add_argument(
        "--processes", type=whole(1), default=max(1, cores // 2), help="busy ones (default: half of the cores)"
    )
    return parser.parse_args(arguments)


def main() -> int:
    args = parse(sys.argv[1:])
    for key, value in machine.describe(machine.measure()).items():
        print(f"{key}: {value}", flush=True)
    job = make_job(args.model, prompts=1).cut(prompts=1, segments=SEGMENTS)
    rows = [run(job, args.processes, args.runs, TARGET if args.model == "smol" else None)]
    print(f"\n{table(rows)}\n")
    for line in missed_targets(rows):
        print(line)
    return 0  # a missed target may be noise; a failed check never is


if __name__ == "__main__":
    sys.exit(main())
