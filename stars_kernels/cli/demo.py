"""`stars demo`: what alignment at decode time does, on this machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stars_kernels.cli.common import stderr, told_errors
from stars_kernels.decoder.output import StarsOutput
from stars_kernels.evaluation.demo import PROMPTS, demo, demo_model


def show_demo(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts of yours.", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Hub name, folder, or .gguf file; SmolLM2-135M-Instruct.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 60,
    seed: Annotated[int, typer.Option(help="Of every random number.")] = 0,
) -> None:
    """Let a small language model answer as it is, and aligned: the reward is how glad an answer sounds, by VADER.

    [bold]Examples[/]

      stars demo

      stars demo "Write a letter to my landlord." --seed 1
    """
    with told_errors():
        model = model or demo_model()
        stderr.print(f"loads {escape(model)}; a minute or two on a laptop", soft_wrap=True)
        out = Console()
        for pair in demo(model, prompts=prompts or PROMPTS, max_new_tokens=max_new_tokens, seed=seed):
            table = Table("plain sampling", "STARS", title=escape(pair.prompt), expand=True, show_lines=True)
            table.add_row(*(escape(" ".join((output.text or "").split())) for output in (pair.plain, pair.stars)))
            table.add_row(*(f"reward {output.reward:+.2f}, {_cost(output)}" for output in (pair.plain, pair.stars)))
            out.print(table)


def _cost(output: StarsOutput) -> str:
    return f"{output.counts.judged} tokens sampled, {sum(output.seconds.values()):.1f} s"
