"""`stars serve`: an HTTP server that OpenAI's clients can talk to."""

from __future__ import annotations

import logging
import os
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
    told_errors,
)
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.naming import rule_names
from stars_kernels.decoder.output import Calibration

LIMITS = ("waiting", "choices", "attempts", "max_time", "body_bytes", "grace")
"""Options that are fields of `stars_kernels.serve.Limits`."""
OF_SERVE = OF_MODELS | {"rule", "calibration", "host", "port", "model_name", "api_key_env", *LIMITS}
"""Options of `stars serve` that are no settings of a call."""
KEY = "STARS_API_KEY"
"""Environment variable that is looked at where no other is named."""


def serve(
    model: ModelName = None,
    reward_model: RewardModels = None,
    host: Annotated[str | None, typer.Option(help="127.0.0.1: this machine alone.")] = None,
    port: Annotated[int | None, typer.Option(help="8000; 0 = any that is free.")] = None,
    model_name: Annotated[str | None, typer.Option(help="That requests name; the last part of the model's.")] = None,
    rule: Annotated[str | None, typer.Option(help=f"Of requests that name none: {', '.join(rule_names())}.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="Attempts of best-of and the like.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of requests that give no max_tokens; 128.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of requests that give none; 1.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="r* and beta from a file that was saved.")] = None,
    reward_threshold: Annotated[float | None, typer.Option(help="r*, in place of a calibration.")] = None,
    beta: Annotated[float | None, typer.Option(help="Acceptance temperature, in the reward's units.")] = None,
    seed: Seed = None,
    batch_size: Annotated[int | None, typer.Option(help="Slots: answers side by side; as many as fit.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help=f"Environment variable with the API key; {KEY}.")] = None,
    waiting: Annotated[int | None, typer.Option(help="Answers that may wait for a slot; 128, then status 429.")] = None,
    choices: Annotated[int | None, typer.Option(help="Answers of one request, at most; 32.")] = None,
    attempts: Annotated[int | None, typer.Option(help="Of a request's rule at a segment, at most; 256.")] = None,
    max_time: Annotated[float | None, typer.Option(help="Seconds of a request, at most; 600.")] = None,
    grace: Annotated[float | None, typer.Option(help="Seconds to end requests in, on SIGTERM; 30.")] = None,
    body_bytes: Annotated[int | None, typer.Option(help="Of a request's body, at most; 4 MiB.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting of StarsConfig or the rule: NAME=VALUE.")
    ] = None,
    config: Options = None,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Serve the models to OpenAI's clients: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.

    Settings are those of requests that give none of their own. Answers of users who ask at the same time are decoded
    side by side, each the one that it would be alone.

    [bold]Examples[/]

      stars serve -m MODEL -r RM --calibration calibration.json

      stars serve -m MODEL -r RM --rule best-of --n 8 --port 8080

    [bold]Exit codes[/]: 0 = it was stopped by SIGTERM or Ctrl-C, 2 = it could not begin.
    """
    with told_errors():
        flags = {name: value for name, value in locals().items() if name not in ("set_", "config")}
        options = merged(config, flags) | parsed(set_ or [])
        settings = settings_of(options, OF_SERVE)
        _serve(options, settings)


def _serve(options: dict[str, Any], settings: dict[str, Any]) -> None:
    """Check what can be checked before models are loaded, then serve."""
    from stars_kernels.serve import Limits
    from stars_kernels.serve import serve as serve_engine
    from stars_kernels.serve.asked import check_target

    given = {name: options[name] for name in LIMITS if options.get(name) is not None}
    limits, key, target = Limits(**given), api_key_of(options.get("api_key_env")), options.get("calibration")
    known = None if target is None else Calibration.load(target)
    if known is None:
        models_of(options)  # says what is missing of them
        check_target(StarsConfig(**settings))
    own = {name: options[name] for name in ("host", "port") if options.get(name) is not None}
    logging.basicConfig(format="%(message)s")
    with engine_of(options, settings) as engine:
        serve_engine(
            engine, **own, ready=announce, calibration=known, model_name=options.get("model_name"), api_key=key,
            limits=limits,
        )  # fmt: skip
    stderr.print("stopped")


def api_key_of(variable: str | None) -> str | None:
    """Return the API key: of the variable that is named, which has to have one, or of `KEY`, if it has one."""
    key = os.environ.get(variable or KEY, "").strip()
    if not key and variable is not None:
        raise UsageError(f"--api-key-env names {variable}, which is not set; expected it to have the API key")
    return key or None


def announce(url: str) -> None:
    """Tell where the server is, once it is up."""
    stderr.print(f"serving at {escape(url)}/v1", soft_wrap=True)
