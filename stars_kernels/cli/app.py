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

from stars_kernels.cli.arguments import Usage, merged, parsed, reward_of, rule_names, settings_of
from stars_kernels.data import BadRow, PromptRow, Summary, read_prompts, run_file
from stars_kernels.data.manifest import versions
from stars_kernels.decoder.errors import DecodeError, StarsError, message_of
from stars_kernels.decoder.output import Calibration, StarsEvent
from stars_kernels.hf.engine import Engine
from stars_kernels.hf.families import CLASSIFIERS, WORKS
from stars_kernels.ops import backends

app = typer.Typer(
    name="stars",
    help="Aligned answers of a language model, by a reward model, at decode time: STARS and its relatives.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)
told = Console(stderr=True)
"""For people; what a command gives goes to stdout."""
OF_RUN = {
    "model",
    "reward_model",
    "rule",
    "input",
    "output",
    "limit",
    "stream",
    "overwrite",
    "retry",
    "calibration",
    "dtype",
}
"""Options of `stars run` that are no settings of a call."""


@contextmanager
def told_errors() -> Iterator[None]:
    """End the command with what went wrong, in a line: code 2 = before it began, 1 = on the way, 130 = stopped."""
    try:
        yield
    except KeyboardInterrupt:
        told.print("stopped")
        raise typer.Exit(130) from None
    except BrokenPipeError:  # who read stdout has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except (StarsError, DecodeError, OSError) as error:
        code = 2 if isinstance(error, FileNotFoundError | FileExistsError) else 1
        told.print(f"[red]error[/]: {escape(message_of(error))}", soft_wrap=True)
        raise typer.Exit(code) from None
    except (ValueError, TypeError) as error:
        told.print(f"[red]error[/]: {escape(message_of(error))}", soft_wrap=True)
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
) -> None:
    """Answer one prompt, or a file of prompts into a folder.

    The folder gets results.jsonl, a line per prompt as soon as it is answered, and manifest.json, what the answers
    follow from. The same command again goes on where it stopped.

    [bold]Examples[/]

      stars run --model MODEL --reward-model RM "Name a colour."

      stars run -m MODEL -r RM -i prompts.jsonl -o out --seed 0

      stars run -m MODEL -r rewards:politeness@0.5 -r RM@1 -i prompts.jsonl -o out --rule best-of --n 8
    """
    with told_errors():
        flags = {name: value for name, value in locals().items() if name not in ("prompt", "set_", "config")}
        options = merged(config, {**flags, **parsed(set_ or [])})
        source, folder = options.get("input"), options.get("output")
        if (prompt is None) == (source is None):
            raise Usage(
                f"{'a prompt and' if prompt else 'neither a prompt nor'} --input is given, expected one of them"
            )
        if (folder is None) != (source is None):
            raise Usage("--input and --output go together: the answers to a file go to a folder")
        settings = settings_of(options, OF_RUN)
        target = options.get("calibration")
        known = None if target is None else Calibration.load(target)
        show = _printed if options.get("stream") else None
        with _engine(options) as engine:
            if source is None or folder is None:
                _answer(engine, prompt, known, show, settings)
                return
            summary = run_file(
                engine, source, folder, calibration=known, limit=options.get("limit"), on_event=show,
                overwrite=bool(options.get("overwrite")), retry=bool(options.get("retry")), **settings,
            )  # fmt: skip
            _sum_up(summary)


@app.command()
def calibrate(
    input: Annotated[Path, typer.Option("--input", "-i", help="File of prompts like those that are to be answered.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON for --calibration.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Hub name, folder, or .gguf file.")] = None,
    reward_model: Annotated[
        list[str] | None,
        typer.Option("--reward-model", "-r", help="Hub name, folder, or module:function; several as NAME@WEIGHT."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Plain continuations, in all.")] = 64,
    quantile: Annotated[float, typer.Option(help="r* is this quantile of their rewards.")] = 0.9,
    acceptance: Annotated[float, typer.Option(help="Share of them that would be accepted at r*.")] = 0.25,
    seed: Annotated[int, typer.Option(help="Of every random number.")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any setting of StarsConfig: NAME=VALUE.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with these options; flags go first.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of the file to sample from.")] = None,
) -> None:
    """Find r* and beta from plain continuations of a file's prompts, for `stars run --calibration`.

    [bold]Example[/]

      stars calibrate -m MODEL -r RM -i prompts.jsonl -o calibration.json
    """
    with told_errors():
        options = merged(config, {"model": model, "reward_model": reward_model, **parsed(set_ or [])})
        settings = settings_of(options, OF_RUN)
        settings |= {"calibration_quantile": quantile, "calibration_acceptance": acceptance, "seed": seed}
        rows = read_prompts(input, limit)
        bad = next((row for row in rows if isinstance(row, BadRow)), None)
        if bad is not None or not rows:
            raise Usage(bad.error if bad is not None else f"{input} has no prompts, expected one at least")
        with _engine(options) as engine:
            prompts = [row.prompt for row in rows if isinstance(row, PromptRow)]
            found = engine.calibrate(prompts[:samples], calibration_samples=samples, **settings)
        found.save(output)
        told.print(
            f"r* {found.reward_threshold:.4f}, beta {found.beta:.4f}, from {len(found.rewards)} continuations of "
            f"{min(len(prompts), samples)} prompts: {output}", soft_wrap=True,
        )  # fmt: skip


@app.command()
def env() -> None:
    """Tell what answers and speed depend on: versions, devices, and which version of each op runs here."""
    table = Table("what", "found", title="environment")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = {**versions(), "platform": platform.platform(), "threads": str(torch.get_num_threads())}
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


def _engine(options: dict[str, Any]) -> Engine:
    if options.get("model") is None:
        raise Usage("--model is missing, expected a hub name, a folder, or a .gguf file")
    names = options.get("reward_model") or []
    with told.status("loading"):
        return Engine(options["model"], reward_of([names] if isinstance(names, str) else names))


def _answer(engine: Engine, prompt: Any, known: Calibration | None, show: Any, settings: dict[str, Any]) -> None:
    for event in engine.stream(prompt, calibration=known, **settings):
        if show is not None:
            show(event)
        if isinstance(event.output, Exception):
            raise event.output
        if event.output is not None:
            if show is None:
                print(event.output.text, flush=True)
            output, counts = event.output, event.output.counts
            told.print(
                f"reward {output.reward:.4f} (of the empty answer {output.prompt_reward:.4f}), "
                f"{len(output.token_ids)} tokens, {counts.attempts} attempts, seed {output.config.seed}",
                soft_wrap=True,
            )


def _printed(event: StarsEvent) -> None:
    """Print what an answer grew by; of a file each piece has a line, with its id."""
    if event.text and event.request_id is not None:
        print(json.dumps({"custom_id": event.request_id, "text": event.text}, ensure_ascii=False), flush=True)


def _sum_up(summary: Summary) -> None:
    speed = f", {summary.tokens / summary.seconds:.1f} tokens/s" if summary.tokens else ""
    told.print(
        f"{summary.answers} of {summary.prompts} prompts answered, {summary.errors} failed{speed}: {summary.folder}",
        soft_wrap=True,
    )
    if summary.errors:
        told.print("--retry tries those again that failed")
