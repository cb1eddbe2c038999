"""`stars report`: show a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoTokenizer

from stars_kernels.cli.common import told_errors
from stars_kernels.hf.loading.language_model import check_path
from stars_kernels.report import write_report


def report(
    source: Annotated[
        Path, typer.Argument(help="Folder of stars run or stars compare, or JSON file of outputs.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; report.html in the folder, FILE.html of a file.")
    ] = None,
    beside: Annotated[Path | None, typer.Option(help="Another run, to be shown beside the first one.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The language model's: makes texts of attempts that were kept as tokens alone.")
    ] = None,
    max_mb: Annotated[float, typer.Option(help="What the page may weigh; texts of rejected attempts go first.")] = 20.0,
) -> None:
    """Show a run as one HTML page that needs nothing else: its figures, prompts, and every attempt.

    A run with --set trace=full keeps the texts of rejected attempts, which are shown then.

    [bold]Examples[/]

      stars report out

      stars report out --beside best-of-8 -o both.html
    """
    with told_errors():
        known = None
        if tokenizer is not None:
            check_path("--tokenizer", tokenizer)
            known = AutoTokenizer.from_pretrained(tokenizer)
        target = output or (source / "report.html" if source.is_dir() else source.with_suffix(".html"))
        print(write_report(source, target, beside, tokenizer=known, max_mb=max_mb))
