"""Benchmarks: python -m bench SUITE. Contestants are checked against each other first, then timed.

Without a suite, python -m bench --device cuda runs all that are timed, and vLLM's where it is installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from demo.arguments import output_file

TIMED = ("decode", "ops")
"""Modules with `add_arguments(parser)` and `run(args) -> list[Row]`; args.device and its args.rates."""
MODELLED = ("roofline",)
"""The same, but run() prints its own tables, by formula, and returns an exit code."""
ALONE = ("calls", "first")
"""The same, but with all its options, --device among them, in its own `add_arguments`."""
DEVICES = ("cpu", "cuda")


def parse(arguments: list[str]) -> tuple[argparse.ArgumentParser, ModuleType | None, argparse.Namespace]:
    """Return the parser, the suite's module (None where no suite is named: then all are meant) and the arguments."""
    names = TIMED + MODELLED + ALONE
    names = tuple(name for name in names if name in arguments[:1]) or names  # torch is not imported for nothing
    modules = {name: import_module(f"bench.{name}") for name in names}
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", choices=DEVICES, dest="all_on", help="without a suite: run all of them there")
    parser.add_argument("--quick", action="store_true", dest="all_quick", help="and with less work")
    suites = parser.add_subparsers(dest="suite")
    for name, suite in modules.items():
        summary = (suite.__doc__ or "").partition("\n")[0]
        subparser = suites.add_parser(name, help=summary, description=summary)
        if name in TIMED:
            subparser.add_argument("--quick", action="store_true", help="less work, for a few minutes in all")
            subparser.add_argument("--device", choices=DEVICES, default="cpu", help="where it all runs (default cpu)")
        if name not in ALONE:
            subparser.add_argument("--json", type=output_file, metavar="FILE", help="write all that is found here")
        suite.add_arguments(subparser)
    args = parser.parse_args(arguments)
    if args.suite is None and args.all_on is None:
        parser.error(f"expected a suite ({', '.join(names)}), or --device for all of them")
    if args.suite and (args.all_on or args.all_quick):
        parser.error(f"--device and --quick of one suite go behind its name, {args.suite}")
    args.device = args.all_on if args.suite is None else vars(args).get("device")
    return parser, modules.get(args.suite), args


def main() -> int:
    parser, suite, args = parse(sys.argv[1:])
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error(f"argument --device: no CUDA device (torch {torch.__version__})")
    if suite is None:
        return time_all(args)
    return int(suite.run(args)) if args.suite in MODELLED + ALONE else time_suite(suite, args)


def time_all(args: argparse.Namespace) -> int:
    """Run each suite in a process of its own, which gives its memory back; go on whatever becomes of one."""
    quick = ["--quick"] if args.all_quick else []
    commands = [["bench", suite, "--device", args.device, *quick] for suite in ("ops", "decode")]
    if args.device == "cuda" and find_spec("vllm"):
        commands.append(["bench.rival_vllm", *quick])
    elif args.device == "cuda":
        print("NOT RUN: bench.rival_vllm, vllm is not installed here", flush=True)
    failed = 0
    for command in commands:
        print(f"== python -m {' '.join(command)}", flush=True)
        failed |= subprocess.run([sys.executable, "-m", *command]).returncode != 0
    return int(failed)


def time_suite(suite: ModuleType, args: argparse.Namespace) -> int:
    from transformers.utils.logging import disable_progress_bar

    from bench import machine
    from bench.report import CheckError, missed_targets, table, write_json

    disable_progress_bar()  # of loading, which would fill a log
    args.rates = machine.measure(args.device)
    facts = machine.describe(args.rates, args.device)
    for key, value in facts.items():
        print(f"{key}: {value}", flush=True)
    try:
        rows = suite.run(args)
    except CheckError as error:
        print(f"CHECK FAILED, nothing was timed: {error}", file=sys.stderr)
        return 1
    print(f"\n{table(rows)}\n")
    for line in missed_targets(rows):
        print(line)
    if args.json:
        write_json(args.json, facts, rows)
    return 0  # a missed target may be noise; a failed check never is


if __name__ == "__main__":
    sys.exit(main())
