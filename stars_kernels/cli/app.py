"""The command `stars`: its subcommands, a file each, which is imported once its command is called."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import stars_kernels

COMMANDS = {
    "run": ("run:run", "Answer one prompt, or a file of prompts into a folder."),
    "calibrate": (
        "calibrate:calibrate",
        "Find r* and beta from plain continuations of a file's prompts, for `stars run --calibration`.",
    ),
    "compare": (
        "compare:compare",
        "Answer prompts under several rules, and judge the answers against plain sampling's.",
    ),
    "report": (
        "report:report",
        "Show a run as one HTML page that needs nothing else: its figures, prompts, and every attempt.",
    ),
    "serve": (
        "serve:serve",
        "Serve the models to OpenAI's clients: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.",
    ),
    "check": (
        "check:check",
        "Load a language model or a reward model, and tell how it would be decoded, or why it is refused.",
    ),
    "env": (
        "environment:env",
        "Tell what answers and speed depend on: versions, devices, and which version of each op runs here.",
    ),
    "families": (
        "environment:families",
        "List the model classes that are decoded, and how; of reward models, the sequence classifiers.",
    ),
    "demo": (
        "demo:show_demo",
        "Let a small language model answer as it is, and aligned: the reward is how glad an answer sounds, by VADER.",
    ),
}
"""Module and function of each command, and its first line of help: importing them all would take seconds."""


class LateCommand(TyperCommand):
    """A command of which no more is known than its line of help, until it is called or its own help is asked for."""

    def __init__(self, name: str, place: str, line: str) -> None:
        super().__init__(name, callback=None, help=line, rich_markup_mode="rich")
        self._place = place

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Go on as the command itself."""
        return self.itself().make_context(info_name, args, parent=parent, **extra)

    def itself(self) -> Any:
        """Import the command."""
        module, _, function = self._place.partition(":")
        alone = typer.Typer(rich_markup_mode="rich", add_completion=False)
        alone.command(self.name)(getattr(import_module(f"stars_kernels.cli.{module}"), function))
        return typer.main.get_command(alone)


class LateCommands(TyperGroup):
    """The commands of `COMMANDS`."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, (place, line) in COMMANDS.items():
            self.add_command(LateCommand(name, place, line))


app = typer.Typer(
    name="stars",
    cls=LateCommands,
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
        import_module("transformers.utils.logging").disable_progress_bar()  # of loading, which would fill a log
