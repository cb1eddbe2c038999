"""`stars check`: what an engine makes of a model."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stars_kernels.cli.common import stderr, told_errors
from stars_kernels.hf.check import check_model, check_pair


def check(
    model: Annotated[str, typer.Argument(help="Hub name, folder, or .gguf file.", show_default=False)],
    reward_model: Annotated[
        str | None, typer.Option("--reward-model", "-r", help="A reward model that is to read its answers.")
    ] = None,
) -> None:
    """Load a language model or a reward model, and tell how it would be decoded, or why it is refused.

    [bold]Examples[/]

      stars check MODEL

      stars check MODEL --reward-model RM

    [bold]Exit codes[/]: 0 = it is taken, 1 = it is refused, 2 = there is no such model.
    """
    with told_errors():
        with stderr.status("loading"):
            found = [check_model(name) for name in (model, reward_model) if name is not None]
        for one in found:
            table = Table("what", "found", title=escape(one.name))
            table.add_row("kind", one.kind)
            for name, value in one.facts.items():
                table.add_row(name, escape(value))
            for name, count in one.rewrites.items():
                table.add_row(f"replaced: {name}", str(count))
            if one.refused is not None:
                table.add_row("[red]refused[/]", escape(one.refused))
            Console().print(table)
        if any(one.refused is not None for one in found):
            raise typer.Exit(1)
        if reward_model is not None:
            try:
                told = check_pair(model, reward_model)
            except ValueError as error:
                stderr.print(f"[red]refused together[/]: {escape(str(error))}", soft_wrap=True)
                raise typer.Exit(1) from None
            Console().print(f"the reward model {told}", soft_wrap=True)
