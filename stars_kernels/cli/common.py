"""What the commands share: their options for models, the engine of these, and how errors are told."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from stars_kernels.cli.arguments import UsageError
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.errors import DecodeError, StarsError, message_of
from stars_kernels.evaluation import JudgeError
from stars_kernels.hf.by_name import Loaded, as_list, load_by_name
from stars_kernels.hf.engine import Engine

stderr = Console(stderr=True)
"""For people; what a command gives goes to stdout."""
OF_MODELS = frozenset({"model", "reward_model", "device", "dtype"})
"""Options of the models, which are no settings of a call."""
ModelName = Annotated[str | None, typer.Option("--model", "-m", help="Hub name, folder, or .gguf file.")]
RewardModels = Annotated[
    list[str] | None,
    typer.Option("--reward-model", "-r", help="Hub name, folder, or module:function; several as NAME@WEIGHT."),
]
Device = Annotated[str | None, typer.Option(help="cuda where there is one, else cpu.")]
DType = Annotated[str | None, typer.Option(help="Of the models: float32, bfloat16, float16; as saved.")]
Seed = Annotated[int | None, typer.Option(help="Of every random number.")]
Options = Annotated[Path | None, typer.Option("--config", help="YAML with these options; flags go first.")]


@contextmanager
def told_errors() -> Iterator[None]:
    """End the command with what went wrong, in a line: code 2 = before it began, 1 = on the way, 130 = stopped."""
    try:
        yield
    except KeyboardInterrupt:
        stderr.print("stopped; the same command goes on")
        raise typer.Exit(130) from None
    except BrokenPipeError:  # who read stdout has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except (StarsError, DecodeError, JudgeError, OSError) as error:
        code = 2 if isinstance(error, FileNotFoundError | FileExistsError | ConnectionError) else 1
        stderr.print(f"[red]error[/]: {escape(_told(error))}", soft_wrap=True)
        raise typer.Exit(code) from None
    except (ValueError, TypeError, ImportError) as error:  # ImportError: of an extra that is not installed
        stderr.print(f"[red]error[/]: {escape(message_of(error))}", soft_wrap=True)
        raise typer.Exit(2) from None


def _told(error: Exception) -> str:
    """Return what an error says, of a file that is missing without its number."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return message_of(error)


def load_models(options: dict[str, Any], settings: dict[str, Any]) -> Loaded:
    """Check the settings, then load the models onto a device."""
    StarsConfig(**settings)
    with stderr.status("loading"):
        return load_by_name(**models_of(options))


def engine_of(options: dict[str, Any], settings: dict[str, Any]) -> Engine:
    """Check the settings, then load the models into an engine."""
    loaded = load_models(options, settings)
    with stderr.status("loading"):
        return loaded.engine(**settings)


def models_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the models, as `load_by_name` takes them."""
    name, rewards = options.get("model"), as_list(options.get("reward_model"))
    if name is None:
        raise UsageError("--model is missing, expected a hub name, a folder, or a .gguf file")
    if not rewards:
        raise UsageError("--reward-model is missing, expected a hub name, a folder, or module:function")
    return {"model": name, "reward_model": rewards, "device": options.get("device"), "dtype": options.get("dtype")}


def switch(name: str, value: Any) -> bool:
    if value not in (None, True, False):
        raise UsageError(f"{name} is {value!r}, expected true or false")
    return bool(value)
