"""What the commands share: their options for models, the engine of these, and how errors are told."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

from stars_kernels.cli.arguments import UsageError, moved, reward_of
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.errors import DecodeError, StarsError, message_of
from stars_kernels.evaluation import JudgeError
from stars_kernels.hf.engine import Engine
from stars_kernels.hf.loading.language_model import check_path, load_language_model
from stars_kernels.hf.scoring.reward_model import Reward

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
        stderr.print(f"[red]error[/]: {escape(message_of(error))}", soft_wrap=True)
        raise typer.Exit(code) from None
    except (ValueError, TypeError, ImportError) as error:  # ImportError: of an extra that is not installed
        stderr.print(f"[red]error[/]: {escape(message_of(error))}", soft_wrap=True)
        raise typer.Exit(2) from None


@dataclass(frozen=True)
class Loaded:
    """The models that options name, on their device."""

    model: Any
    tokenizer: Any
    reward: Reward


def load_models(options: dict[str, Any], settings: dict[str, Any]) -> Loaded:
    """Check the settings, then load the models onto a device."""
    StarsConfig(**settings)
    name = options.get("model")
    if name is None:
        raise UsageError("--model is missing, expected a hub name, a folder, or a .gguf file")
    check_path("--model", name)
    device, dtype = device_of(options.get("device")), dtype_of(options.get("dtype"))
    with stderr.status("loading"):
        reward = reward_of(as_list(options.get("reward_model")), device, dtype)
        model, tokenizer = load_language_model(name, None, trust_remote_code=False)
        return Loaded(moved(model, device, dtype), tokenizer, reward)


def engine_of(options: dict[str, Any], settings: dict[str, Any]) -> Engine:
    """Check the settings, then load the models into an engine."""
    loaded = load_models(options, settings)
    with stderr.status("loading"):
        return Engine(loaded.model, loaded.reward, tokenizer=loaded.tokenizer, **settings)


def as_list(value: Any) -> list[Any]:
    """Return an option of one or several values as a list."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def switch(name: str, value: Any) -> bool:
    if value not in (None, True, False):
        raise UsageError(f"{name} is {value!r}, expected true or false")
    return bool(value)


def device_of(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device is {name!r}, which is not here: {message_of(error)}") from None
    return name


def dtype_of(name: str | None) -> torch.dtype | None:
    kinds = {str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.bfloat16, torch.float16)}
    if name is not None and name not in kinds:
        raise UsageError(f"--dtype is {name!r}, expected one of {', '.join(kinds)}")
    return None if name is None else kinds[name]
