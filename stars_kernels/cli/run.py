"""`stars run`: answer a prompt, or a file of prompts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from stars_kernels.cli.arguments import UsageError, merged, parsed, settings_of
from stars_kernels.cli.common import (
    OF_MODELS,
    Device,
    DType,
    ModelName,
    Options,
    RewardModels,
    Seed,
    engine_of,
    models_of,
    stderr,
    switch,
    told_errors,
)
from stars_kernels.data import Summary, load_prompts, read_results, run_file, run_file_ray
from stars_kernels.data.manifest import Manifest
from stars_kernels.data.run import MANIFEST, RESULTS
from stars_kernels.decoder.naming import rule_names
from stars_kernels.decoder.output import Calibration, StarsEvent
from stars_kernels.hf.engine import Engine

OF_RAY = ("actors", "address")
"""Options of a run by Ray, which need `ray`."""
OF_RUN = OF_MODELS | {"rule", "input", "output", "limit", "stream", "overwrite", "retry", "calibration", "ray", *OF_RAY}
"""Options of `stars run` that are no settings of a call."""
SHOWN = 3
"""Reasons of failures that are told."""


def run(
    prompt: Annotated[str | None, typer.Argument(help="One prompt, in place of a file.", show_default=False)] = None,
    model: ModelName = None,
    reward_model: RewardModels = None,
    input: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="File of prompts: .jsonl (text, chats, batch rows) or .txt; or: builtin."),
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
    seed: Seed = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts side by side.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting of StarsConfig or the rule: NAME=VALUE.")
    ] = None,
    config: Options = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of the file to answer.")] = None,
    stream: Annotated[bool | None, typer.Option("--stream", help="Print answers as they grow.")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Begin anew in the folder.")] = None,
    retry: Annotated[bool | None, typer.Option("--retry", help="Try the prompts again that failed.")] = None,
    ray: Annotated[bool | None, typer.Option("--ray", help="Share the file out to engines in actors of Ray.")] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="With --ray: engines; one a GPU, or a machine if not given.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="With --ray: of a cluster that runs; this machine if not given.")
    ] = None,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Answer one prompt, or a file of prompts into a folder.

    The folder gets results.jsonl, a line per prompt as soon as it is answered, and manifest.json, what the answers
    follow from. The same command again goes on where it stopped.

    [bold]Examples[/]

      stars run --model MODEL --reward-model RM "Name a colour."

      stars run -m MODEL -r RM -i prompts.jsonl -o out --seed 0

      stars run -m MODEL -r rewards:politeness@0.5 -r RM@1 -i prompts.jsonl -o both --rule best-of --n 8

      stars run -m MODEL -r RM -i prompts.jsonl -o many --seed 0 --ray --actors 3

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
        flag = {name: switch(name, options.get(name)) for name in ("stream", "overwrite", "retry", "ray")}
        show = _print_piece if flag["stream"] else None
        if flag["ray"] or any(options.get(name) is not None for name in OF_RAY):
            _check_ray(options)
        if source is not None:
            load_prompts(source)  # says what is wrong with it before models are loaded
        again: dict[str, Any] = {"limit": options.get("limit"), "overwrite": flag["overwrite"], "retry": flag["retry"]}
        if flag["ray"] and source is not None and folder is not None:
            again |= models_of(options) | {name: options.get(name) for name in OF_RAY} | settings
            _sum_up(run_file_ray(source, folder, calibration=known, **again))
            return
        with engine_of(options, settings) as engine:
            if source is None or folder is None:
                _answer(engine, prompt, known, show)
                return
            _sum_up(run_file(engine, source, folder, calibration=known, on_event=show, **again))


def _check_ray(options: dict[str, Any]) -> None:
    """Refuse what does not go together with --ray."""
    lone = next((name for name in OF_RAY if options.get(name) is not None), None)
    if not options.get("ray"):
        raise UsageError(f"--{lone} is given without --ray, expected both")
    if options.get("input") is None:
        raise UsageError("--ray is given without --input, expected a file of prompts: one prompt needs one engine")
    if options.get("stream"):
        raise UsageError("--ray and --stream are given, expected one of them: actors give whole answers")


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


def _tell_failures(summary: Summary) -> None:
    """Tell why prompts failed, the most frequent reasons first."""
    reasons = Counter(row["error"] for row in read_results(summary.folder) if "error" in row)
    for reason, count in reasons.most_common(SHOWN):
        stderr.print(f"[red]{count} failed[/]: {escape(reason)}", soft_wrap=True)
    more = f" has {len(reasons) - SHOWN} more reasons;" if len(reasons) > SHOWN else " has them all;"
    stderr.print(f"{escape(str(summary.folder / RESULTS))}{more} --retry tries those again that failed", soft_wrap=True)


def _sum_up(summary: Summary) -> None:
    """Tell what a run has come to; where some prompts have no answer, the exit code is 1."""
    left = summary.prompts - summary.answers - summary.errors
    speed = f", {summary.tokens / summary.seconds:.1f} tokens/s" if summary.tokens else ""
    folder, seed = escape(str(summary.folder)), Manifest.load(summary.folder / MANIFEST).config["seed"]
    stderr.print(
        f"{summary.answers} of {summary.prompts} prompts answered, {summary.errors} failed, {left} left{speed}, "
        f"seed {seed}: {folder}",
        soft_wrap=True,
    )
    if summary.answers:
        stderr.print(f"to look at them: stars report {folder}", soft_wrap=True)
    if left:
        stderr.print("the same command goes on")
    if summary.errors:
        _tell_failures(summary)
    if left or summary.errors:
        raise typer.Exit(1)
