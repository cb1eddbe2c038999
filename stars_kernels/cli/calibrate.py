"""`stars calibrate`: find r* and beta."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    engine_of,
    stderr,
    told_errors,
)
from stars_kernels.data import BadLine, PromptLine, load_prompts
from stars_kernels.decoder.calibration import accepted_share
from stars_kernels.evaluation.plots import plot_calibration
from stars_kernels.extras import require

OF_CALIBRATE = OF_MODELS | {"input", "output", "limit", "plot"}
"""Options of `stars calibrate` that are no settings of a call."""


def calibrate(
    input: Annotated[
        Path | None, typer.Option("--input", "-i", help="File of prompts like those that are to be answered.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON for --calibration.")] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG of the rewards, r* and who would be accepted.")] = None,
    model: ModelName = None,
    reward_model: RewardModels = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Plain continuations, in all; 64 if not given.")] = None,
    quantile: Annotated[float | None, typer.Option(help="r* is this quantile of their rewards; 0.9.")] = None,
    acceptance: Annotated[float | None, typer.Option(help="Share of them to be accepted at r*; 0.25.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of a continuation, as of the answers.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random number; 0.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any setting of StarsConfig: NAME=VALUE.")] = None,
    config: Options = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of the file to sample from.")] = None,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Find r* and beta from plain continuations of a file's prompts, for `stars run --calibration`.

    [bold]Example[/]

      stars calibrate -m MODEL -r RM -i prompts.jsonl -o calibration.json

      stars calibrate -m MODEL -r RM -i prompts.jsonl -o calibration.json --plot calibration.svg
    """
    with told_errors():
        names = ("model", "reward_model", "input", "output", "limit", "device", "dtype", "seed", "plot",
                 "max_new_tokens")  # fmt: skip
        flags = {name: value for name, value in locals().items() if name in names}
        own = {"samples": samples, "quantile": quantile, "acceptance": acceptance}
        flags |= {f"calibration_{name}": value for name, value in own.items()}
        options = {"calibration_samples": 64, "seed": 0} | merged(config, flags) | parsed(set_ or [])
        source, target = options.get("input"), options.get("output")
        if source is None or target is None:
            raise UsageError(f"--{'input' if source is None else 'output'} is missing, expected a file")
        lines = load_prompts(source, options.get("limit"))
        bad = next((line for line in lines if isinstance(line, BadLine)), None)
        if bad is not None:
            raise UsageError(bad.error)
        picture = options.get("plot")
        if picture is not None:
            require("matplotlib", "eval")
            Path(picture).parent.mkdir(parents=True, exist_ok=True)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        prompts = [line.prompt for line in lines if isinstance(line, PromptLine)]
        with engine_of(options, settings_of(options, OF_CALIBRATE)) as engine:
            found = engine.calibrate(prompts[: options["calibration_samples"]])
        found.save(target)
        share = accepted_share(found.rewards, found.reward_threshold, found.beta)
        stderr.print(
            f"r* {found.reward_threshold:.4f}, beta {found.beta:.4f}, from {len(found.rewards)} continuations; "
            f"{share:.1%} of such are expected to be accepted at r*: {escape(str(target))}", soft_wrap=True,
        )  # fmt: skip
        if picture is not None:
            plot_calibration(Path(picture), found)
