"""Benchmarks: python -m bench SUITE. Contestants are checked against each other first, then timed."""

from __future__ import annotations

import argparse
import sys

from transformers.utils.logging import disable_progress_bar

from bench import decode, machine, ops
from bench.arguments import output_file
from bench.report import CheckError, missed_targets, table, write_json

SUITES = {"decode": decode, "ops": ops}
"""A module with `add_arguments(parser)` and `run(args) -> list[Row]`; args.rates: of the machine."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    suites = parser.add_subparsers(dest="suite", required=True)
    for name, suite in SUITES.items():
        summary = (suite.__doc__ or "").partition("\n")[0]
        subparser = suites.add_parser(name, help=summary, description=summary)
        subparser.add_argument("--quick", action="store_true", help="less work, for a few minutes in all")
        subparser.add_argument("--json", type=output_file, metavar="FILE", help="write machine and rows here")
        suite.add_arguments(subparser)
    args = parser.parse_args()

    disable_progress_bar()  # of loading, which would fill a log
    args.rates = machine.measure()
    facts = machine.describe(args.rates)
    for key, value in facts.items():
        print(f"{key}: {value}", flush=True)
    try:
        rows = SUITES[args.suite].run(args)
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
