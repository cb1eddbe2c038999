"""The commands: their options, and what they print."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stars_kernels.cli.arguments import UsageError, merged, moved, parsed, reward_of, rule_names, settings_of
from stars_kernels.data import BadLine, PromptLine, Summary, read_prompts, run_file
from stars_kernels.data.manifest import versions
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.errors import DecodeError, StarsError, message_of
from stars_kernels.decoder.output import Calibration, StarsEvent
from stars_kernels.hf.engine import Engine
from stars_kernels.hf.families import CLASSIFIERS, WORKS
from stars_kernels.hf.loading.language_model import check_path, load_language_model
from stars_kernels.ops import backends

app = typer.Typer(
    name="stars",
    help="Aligned answers of a language model, by a reward model, at decode time: STARS and its relatives.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)
stderr = Console(stderr=True)
"""For people; what a command gives goes to stdout."""
OF_MODELS = frozenset({"model", "reward_model", "device", "dtype"})
OF_RUN = OF_MODELS | {"rule", "input", "output", "limit", "stream", "overwrite", "retry", "calibration"}
"""Options of `stars run` that are no settings of a call."""
OF_CALIBRATE = OF_MODELS | {"input", "output", "limit"}


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
    except (StarsError, DecodeError, OSError) as error:
        code = 2 if isinstance(error, FileNotFoundError | FileExistsError) else 1
        stderr.print(f"[red]error[/]: {escape(message_of(error))}", soft_wrap=True)
        raise typer.Exit(code) from None
    except (ValueError, TypeError) as error:
        stderr.print(f"[red]error[/]: {escape(message_of(error))}", soft_wrap=True)
        raise typer.Exit(2) from None


@app.command()
def run(
    prompt: Annotated[str | None, typer.Argument(help="One prompt, in place of a file.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Hub name, folder, or .gguf file.")] = None,
    reward_model: Annotated[
        list[str] | None,
        typer.Option("--reward-model", "-r", help="Hub name, folder, or module:function; several as NAME@WEIGHT."),
    ] = None,
    input: Annotated[
        Path | None, typer.Option("--input", "-i", help="File of prompts: .jsonl (text, chats, batch rows) or .txt.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run; the same run goes on there.")
    ] = None,
    rule: Annotated[str | None, typer.Option(help=f"What decides: {', '.join(rule_names())}.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="Attempts of best-of and the like.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer, at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampling.")] = None,
    reward_threshold: Annotated[
        float | None, typer.Option(help="r*; without it and beta, they are calibrated.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Acceptance temperature, in the reward's units.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="r* and beta from a file that was saved.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random number.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts side by side.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting of StarsConfig or the rule: NAME=VALUE.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with these options; flags go first.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of the file to answer.")] = None,
    stream: Annotated[bool | None, typer.Option("--stream", help="Print answers as they grow.")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Begin anew in the folder.")] = None,
    retry: Annotated[bool | None, typer.Option("--retry", help="Try the prompts again that failed.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda where there is one, else cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the models: float32, bfloat16, float16; as saved.")] = None,
) -> None:
    """Answer one prompt, or a file of prompts into a folder.

    The folder gets results.jsonl, a line per prompt as soon as it is answered, and manifest.json, what the answers
    follow from. The same command again goes on where it stopped.

    [bold]Examples[/]

      stars run --model MODEL --reward-model RM "Name a colour."

      stars run -m MODEL -r RM -i prompts.jsonl -o out --seed 0

      stars run -m MODEL -r rewards:politeness@0.5 -r RM@1 -i prompts.jsonl -o both --rule best-of --n 8

    [bold]Exit codes[/]: 0 = all are answered, 1 = some are not, 2 = it could not begin, 130 = stopped.
    """
    with told_errors():
        flags = {name: value for name, value in locals().items() if name not in ("prompt", "set_", "config")}
        options = merged(config, flags) | parsed(set_ or [])
        source, folder = options.get("input"), options.get("output")
        if (prompt is None) == (source is None):
            given = "a prompt and --input are given" if prompt else "neither a prompt nor --input is given"
            raise UsageError(f"{given}, expected one of them")
        if (folder is None) != (source is None):
            raise UsageError("--input and --output go together: the answers to a file go to a folder")
        settings = settings_of(options, OF_RUN)
        target = options.get("calibration")
        known = None if target is None else Calibration.load(target)
        flag = {name: _switch(name, options.get(name)) for name in ("stream", "overwrite", "retry")}
        show = _print_piece if flag["stream"] else None
        if source is not None:
            read_prompts(Path(source))  # says what is wrong with it before models are loaded
        with _engine(options, settings) as engine:
            if source is None or folder is None:
                _answer(engine, prompt, known, show)
                return
            summary = run_file(
                engine, source, folder, calibration=known, limit=options.get("limit"), on_event=show,
                overwrite=flag["overwrite"], retry=flag["retry"],
            )  # fmt: skip
            _sum_up(summary)


@app.command()
def calibrate(
    input: Annotated[
        Path | None, typer.Option("--input", "-i", help="File of prompts like those that are to be answered.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON for --calibration.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Hub name, folder, or .gguf file.")] = None,
    reward_model: Annotated[
        list[str] | None,
        typer.Option("--reward-model", "-r", help="Hub name, folder, or module:function; several as NAME@WEIGHT."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Plain continuations, in all; 64 if not given.")] = None,
    quantile: Annotated[float | None, typer.Option(help="r* is this quantile of their rewards; 0.9.")] = None,
    acceptance: Annotated[float | None, typer.Option(help="Share of them to be accepted at r*; 0.25.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random number; 0.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any setting of StarsConfig: NAME=VALUE.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with these options; flags go first.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of the file to sample from.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda where there is one, else cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the models: float32, bfloat16, float16; as saved.")] = None,
) -> None:
    """Find r* and beta from plain continuations of a file's prompts, for `stars run --calibration`.

    [bold]Example[/]

      stars calibrate -m MODEL -r RM -i prompts.jsonl -o calibration.json
    """
    with told_errors():
        names = ("model", "reward_model", "input", "output", "limit", "device", "dtype", "seed")
        flags = {name: value for name, value in locals().items() if name in names}
        own = {"samples": samples, "quantile": quantile, "acceptance": acceptance}
        flags |= {f"calibration_{name}": value for name, value in own.items()}
        options = {"calibration_samples": 64, "seed": 0} | merged(config, flags) | parsed(set_ or [])
        source, target = options.get("input"), options.get("output")
        if source is None or target is None:
            raise UsageError(f"--{'input' if source is None else 'output'} is missing, expected a file")
        lines = read_prompts(Path(source), options.get("limit"))
        bad = next((line for line in lines if isinstance(line, BadLine)), None)
        if bad is not None or not lines:
            raise UsageError(bad.error if bad is not None else f"{source} has no prompts, expected one at least")
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        prompts = [line.prompt for line in lines if isinstance(line, PromptLine)]
        with _engine(options, settings_of(options, OF_CALIBRATE)) as engine:
            found = engine.calibrate(prompts[: options["calibration_samples"]])
        found.save(target)
        stderr.print(
            f"r* {found.reward_threshold:.4f}, beta {found.beta:.4f}, from {len(found.rewards)} continuations: "
            f"{escape(str(target))}", soft_wrap=True,
        )  # fmt: skip


@app.command()
def env() -> None:
    """Tell what answers and speed depend on: versions, devices, and which version of each op runs here."""
    table = Table("what", "found", title="environment")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = {**versions(_device(None)), "platform": platform.platform(), "threads": str(torch.get_num_threads())}
    for name, value in {**found, "GPU": ", ".join(devices) or "none"}.items():
        table.add_row(name, value)
    ops = Table("op", "CPU", "CUDA", title="versions of the ops")
    for op, here in backends().items():
        ops.add_row(op, here["cpu"], here["cuda"])
    for one in (table, ops):
        Console().print(one)


@app.command()
def families(find: Annotated[str, typer.Argument(help="Part of a class's name.")] = "") -> None:
    """List the model classes that are decoded, and how; of reward models, the sequence classifiers."""
    table = Table("class", "as a language model", "as a reward model")
    for name in sorted({*WORKS, *CLASSIFIERS}, key=str.lower):
        if find.lower() in name.lower():
            table.add_row(name, WORKS.get(name, ""), "classifier" if name in CLASSIFIERS else "")
    Console().print(table if table.row_count else f"no class has {escape(repr(find))} in its name")


def _engine(options: dict[str, Any], settings: dict[str, Any]) -> Engine:
    """Check the settings, then load the models onto a device."""
    StarsConfig(**settings)
    name, rewards = options.get("model"), options.get("reward_model") or []
    if name is None:
        raise UsageError("--model is missing, expected a hub name, a folder, or a .gguf file")
    check_path("--model", name)
    device, dtype = _device(options.get("device")), _dtype(options.get("dtype"))
    with stderr.status("loading"):
        reward = reward_of([rewards] if isinstance(rewards, str) else rewards, device, dtype)
        model, tokenizer = load_language_model(name, None, trust_remote_code=False)
        return Engine(moved(model, device, dtype), reward, tokenizer=tokenizer, **settings)


def _switch(name: str, value: Any) -> bool:
    if value not in (None, True, False):
        raise UsageError(f"{name} is {value!r}, expected true or false")
    return bool(value)


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device is {name!r}, which is not here: {message_of(error)}") from None
    return name


def _dtype(name: str | None) -> torch.dtype | None:
    kinds = {str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.bfloat16, torch.float16)}
    if name is not None and name not in kinds:
        raise UsageError(f"--dtype is {name!r}, expected one of {', '.join(kinds)}")
    return None if name is None else kinds[name]


def _answer(engine: Engine, prompt: Any, known: Calibration | None, show: Any) -> None:
    """Decode one prompt; the answer goes to stdout."""
    for event in engine.stream(prompt, calibration=known):
        if isinstance(event.output, Exception):
            raise event.output
        if show is not None:
            show(event)
        if (output := event.output) is not None:
            if show is None:
                print(output.text, flush=True)
            stderr.print(
                f"reward {output.reward:.4f} (of the empty answer {output.prompt_reward:.4f}), "
                f"{len(output.token_ids)} tokens, {output.counts.attempts} attempts, seed {output.config.seed}",
                soft_wrap=True,
            )


def _print_piece(event: StarsEvent) -> None:
    """Print what an answer grew by, as a line of JSON."""
    if event.text:
        print(json.dumps({"custom_id": event.request_id, "text": event.text}, ensure_ascii=False), flush=True)


def _sum_up(summary: Summary) -> None:
    """Tell what a run has come to; where some prompts have no answer, the exit code is 1."""
    left = summary.prompts - summary.answers - summary.errors
    speed = f", {summary.tokens / summary.seconds:.1f} tokens/s" if summary.tokens else ""
    stderr.print(
        f"{summary.answers} of {summary.prompts} prompts answered, {summary.errors} failed, {left} left{speed}: "
        f"{escape(str(summary.folder))}",
        soft_wrap=True,
    )
    if left:
        stderr.print("the same command goes on")
    if summary.errors:
        stderr.print("--retry tries those again that failed")
    if left or summary.errors:
        raise typer.Exit(1)
