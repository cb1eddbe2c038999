"""The command: parts in the order of their importance, each on its own, within a budget of seconds."""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

import stars_kernels
from bench import machine
from bench.first import decodes, launches
from bench.first.figures import Figure, Report, number, percent
from bench.first.roofline import SIZES
from bench.first.setting import DTYPE, SEED, Setting
from demo.arguments import output_folder, whole

SECONDS = 540
"""By default: for a command that may take ten minutes."""
GRACE = 60
"""Seconds after the budget, at which a part that hangs ends the process."""
NEEDS_CUDA = "there are no CUDA graphs on a CPU"
NO_TIME = "no time was left"
CUT = "the budget ended it after {} figures"


@dataclass(frozen=True)
class Part:
    """What is measured, checked and told together. `work` yields figures, after their checks."""

    name: str
    work: Callable[[Setting], Iterator[Figure]]
    cuda: bool = False
    """It needs a GPU."""


def parts(setting: Setting) -> list[Part]:
    """List what a run measures, the most important first: later parts are for the time that is left."""
    found = [Part("copy", launches.copy)]
    for name in setting.models:
        found.append(Part(f"{name}: gemm", partial(launches.gemm, name=name)))
    found.append(Part("gap", launches.gap, cuda=True))
    for name, op in product(setting.models, launches.OPS):
        found.append(Part(f"{name}: {op}", partial(launches.kernel, name=name, op=op)))
    for name in setting.models:
        shapes = setting.shapes(name)
        for shape, how in product(shapes, decodes.ROUNDS):
            work = partial(decodes.rounds, name=name, shape=shape, how=how)
            found.append(Part(f"{name}: {how} round, {shape}", work, cuda=how == "graph"))
        for shape in shapes:
            found.append(Part(f"{name}: generate, {shape}", partial(decodes.generate, name=name, shape=shape)))
        found.append(Part(f"{name}: naive loop", partial(decodes.naive, name=name, shape=shapes[0])))
    return found


def measure(setting: Setting, report: Report, todo: Sequence[Part], end: float) -> None:
    """Run `todo` until time.monotonic() is `end`, and save after each part; a part that fails leaves the others.

    Raises:
        DeviceLost: the device is of no use to this process any more.
    """
    report.not_reached = {part.name: "not begun" for part in todo}
    for part in todo:
        if part.cuda and setting.kind != "cuda":
            report.not_reached[part.name] = NEEDS_CUDA
        elif time.monotonic() >= end:
            report.not_reached[part.name] = NO_TIME
        else:
            report.not_reached[part.name] = "begun, and not ended"
            report.save()  # for whoever finds the folder after a crash
            failures, began = len(report.failures), time.monotonic()
            run_part(part, setting, report, end)
            report.seconds[part.name] = time.monotonic() - began
            report.rates = dict(setting.rates)
            report.save()
            if len(report.failures) > failures:
                check_device(setting, part)
    report.save()


class DeviceLost(RuntimeError):
    """A failed kernel has taken the CUDA context with it."""


def run_part(part: Part, setting: Setting, report: Report, end: float) -> None:
    """Add the part's figures, or what became of it, to the report."""
    print(f"{part.name} ...", flush=True)
    try:
        for count, figure in enumerate(part.work(setting), start=1):
            report.add(part.name, figure)
            print(f"  {line(figure)}", flush=True)
            if time.monotonic() >= end:
                report.not_reached[part.name] = CUT.format(count)
                return
    except launches.LeftOut as reason:
        report.not_reached[part.name] = str(reason)
        print(f"  left out: {reason}", flush=True)
        return
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        report.failures.append({"part": part.name, "error": what, "traceback": traceback.format_exc()})
        print(f"  FAILED: {what}", flush=True)
    del report.not_reached[part.name]
    report.done.append(part.name)


def check_device(setting: Setting, part: Part) -> None:
    """Raise DeviceLost where a failed part has left the device unusable."""
    try:
        setting.sweep()
        machine.wait(setting.device)
    except RuntimeError as error:  # an illegal access, say: every later call would fail with it
        raise DeviceLost(f"{part.name}: {error}") from error


def line(figure: Figure) -> str:
    beside = "" if figure.roofline is None else f", roofline {number(figure.roofline)}, {percent(figure.share)}"
    return f"{figure.name}: {number(figure.value)} {figure.unit}{beside}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="a CPU is a rehearsal (default cpu)")
    parser.add_argument(
        "--model", nargs="+", choices=SIZES, metavar="MODEL",
        help=f"of {', '.join(SIZES)} (default: tiny on a CPU, else llama-3-8b qwen2.5-0.5b)",
    )  # fmt: skip
    parser.add_argument("--out", type=output_folder, default=Path("build/first"), metavar="FOLDER",
                        help="gets first.json and first.md (default build/first)")  # fmt: skip
    parser.add_argument("--seconds", type=whole(1), default=SECONDS, metavar="N",
                        help=f"no part begins after them (default {SECONDS})")  # fmt: skip
    parser.add_argument("--resume", action="store_true",
                        help="keep what first.json in the folder has, and measure the rest")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; returns 1 where a part failed."""
    end = time.monotonic() + args.seconds
    names = list(dict.fromkeys(args.model or (["tiny"] if args.device == "cpu" else ["llama-3-8b", "qwen2.5-0.5b"])))
    args.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu"), names)
    report = Report(args.out, facts(setting, args))
    if args.resume:
        try:
            report.restore()
        except ValueError as error:
            raise SystemExit(f"--resume: {error}") from error
        setting.rates = dict(report.rates)
    for name, value in report.facts.items():
        print(f"{name}: {value}", flush=True)
    todo = [part for part in parts(setting) if part.name not in report.done]
    # Ends the process where a part hangs; what was measured until then is saved.
    faulthandler.dump_traceback_later(args.seconds + GRACE, exit=True, file=sys.__stderr__)
    try:
        measure(setting, report, todo, end)
    except DeviceLost as error:
        print(f"the device is lost to this process, a new one goes on: {error}", flush=True)
        restart(args, names, end)
    finally:
        faulthandler.cancel_dump_traceback_later()
    print(f"\n{report.markdown()}\nwritten: {report.json_file}", flush=True)
    for failure in report.failures:
        print(f"FAILED: {failure['part']}: {failure['traceback']}", file=sys.stderr, flush=True)
    return int(bool(report.failures))


def restart(args: argparse.Namespace, names: Sequence[str], end: float) -> None:
    """Become a process that measures what is left, in the time that is left."""
    left = max(1, int(end - time.monotonic()))
    options = ["--device", args.device, "--model", *names, "--out", str(args.out), "--seconds", str(left), "--resume"]
    os.execv(sys.executable, [sys.executable, "-m", "bench", "first", *options])


def facts(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    kind = setting.kind
    gpu = setting.datasheet
    return {
        **machine.facts(kind),
        "device": kind,
        "models": ", ".join(setting.models),
        "dtype": str(DTYPE).removeprefix("torch."),
        "seed": SEED,
        "seconds": args.seconds,
        "roofline": "of the rates measured here" if gpu is None else f"of the datasheet of {gpu.name}",
        **{op: served[kind] for op, served in stars_kernels.backends().items()},
    }
