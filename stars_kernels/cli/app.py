"""The command `stars`: its subcommands, a file each."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from transformers.utils import logging

import stars_kernels
from stars_kernels.cli.calibrate import calibrate
from stars_kernels.cli.check import check
from stars_kernels.cli.compare import compare
from stars_kernels.cli.demo import show_demo
from stars_kernels.cli.environment import env, families
from stars_kernels.cli.report import report
from stars_kernels.cli.run import run
from stars_kernels.cli.serve import serve

app = typer.Typer(
    name="stars",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(stars_kernels.__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Tell the version, and end.")
    ] = False,
) -> None:
    """Aligned answers of a language model, by a reward model, at decode time: STARS and its relatives."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # of loading, which would fill a log


for command in (run, calibrate, compare, report, serve, check, env, families):
    app.command()(command)
app.command("demo")(show_demo)
