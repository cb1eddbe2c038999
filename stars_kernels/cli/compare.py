"""`stars compare`: the same prompts under several rules, judged against plain sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stars_kernels.cli.arguments import UsageError, merged, parsed, settings_of, unknown_option
from stars_kernels.cli.common import (
    OF_MODELS,
    Device,
    DType,
    ModelName,
    RewardModels,
    Seed,
    load_models,
    stderr,
    switch,
    told_errors,
)
from stars_kernels.data import load_prompts
from stars_kernels.decoder.config import RULE_SETTINGS
from stars_kernels.decoder.naming import SETTINGS, rule_names
from stars_kernels.decoder.output import Calibration
from stars_kernels.evaluation import Comparison, EndpointJudge, FunctionJudge, RewardJudge
from stars_kernels.evaluation import compare as compare_rules
from stars_kernels.evaluation.figures import BASE
from stars_kernels.evaluation.tables import number, told
from stars_kernels.hf.by_name import Loaded, as_list, device_of, dtype_of, function_of, reward_of
from stars_kernels.hf.engine import Engine

OF_COMPARE = OF_MODELS | {"prompts", "output", "rules", "judge", "limit", "overwrite", "retry", "calibration"}
"""Options of `stars compare` that are no settings of a call."""
OF_JUDGES = {
    "reward_model": frozenset[str](),
    "function": frozenset({"at_once"}),
    "endpoint": frozenset({"model", "api_key_env", "template", "at_once", "retries", "max_tokens", "timeout"}),
}
"""Kinds of judges, and what may be said of each."""


def compare(
    comparison: Annotated[Path, typer.Argument(help="YAML: models, prompts, rules, judge.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the comparison; the same one goes on there.")
    ] = None,
    model: ModelName = None,
    reward_model: RewardModels = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", "-i", help="File of prompts, or: builtin, hh-rlhf, harmfulqa, imdb.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer, at most.")] = None,
    seed: Seed = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any setting of StarsConfig: NAME=VALUE.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of the file to answer.")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Begin all rules anew.")] = None,
    retry: Annotated[bool | None, typer.Option("--retry", help="Try prompts and verdicts again that failed.")] = None,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Answer prompts under several rules, and judge the answers against plain sampling's.

    The folder gets comparison.md, .csv and .json, two pictures, and a run per rule in rules/. The same command again
    goes on where it stopped; rules and prompts may be added. Options go before what the YAML file has.

    [bold]Examples[/]

      stars compare comparison.yaml -o comparison

      stars compare comparison.yaml -o quick --limit 2 --seed 1

    [bold]comparison.yaml[/], for example:

      model: MODEL

      reward-model: RM

      prompts: prompts.jsonl

      rules: {stars: {}, best-of-8: {rule: best-of, n: 8}}

      judge: {reward-model: OTHER}

    [bold]Exit codes[/]: 0 = all are answered and judged, 1 = some are not, 2 = it could not begin, 130 = stopped.
    """
    with told_errors():
        flags = {name: value for name, value in locals().items() if name not in ("comparison", "set_")}
        options = {"calibration_samples": 64} | merged(comparison, flags) | parsed(set_ or [])
        source, folder = options.get("prompts"), options.get("output")
        if source is None or folder is None:
            raise UsageError(
                "prompts are missing, expected a file or a name"
                if source is None
                else "--output is missing, expected a folder"
            )
        settings = shared_settings(options)
        rules = rules_of(options.get("rules"), settings)
        judge = judge_options(options.get("judge"))
        if judge is not None and "function" in judge:
            function_of("judge: function", judge["function"])  # says what is wrong with it before models are loaded
        target = options.get("calibration")
        known = None if target is None else Calibration.load(target)
        flag = {name: switch(name, options.get(name)) for name in ("overwrite", "retry")}
        load_prompts(str(source))  # says what is wrong with it before models are loaded
        loaded = load_models(options, settings)
        with ExitStack() as held:
            with stderr.status("loading"):
                engine = held.enter_context(
                    Engine(loaded.model, loaded.reward, tokenizer=loaded.tokenizer, prefix_cache=0, **settings)
                )
                asked = None if judge is None else held.enter_context(judge_of(judge, loaded, options))
            found = compare_rules(
                engine, str(source), Path(folder), rules, judge=asked, calibration=known, limit=options.get("limit"),
                tell=lambda text: stderr.print(escape(text)), **flag,
            )  # fmt: skip
        _show(found)


def shared_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that hold for all rules, and refuse what is neither a setting nor an option."""
    settings = {name: value for name, value in options.items() if name not in OF_COMPARE}
    for name in settings:
        if name not in SETTINGS:
            raise unknown_option(name, [*OF_COMPARE, *SETTINGS], f"a setting, or one of {sorted(OF_COMPARE)}")
    return {"seed": 0} | settings


def rules_of(rules: Any, shared: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return each rule's settings: its own, and those of all rules that it has."""
    if not isinstance(rules, Mapping) or not rules:
        raise UsageError(f"rules is {rules!r}, expected names and settings: rules: {{stars: {{}}}}")
    return {str(name): _rule(str(name), given, shared) for name, given in rules.items()}


def _rule(name: str, given: Any, shared: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(given or {}, Mapping):
        raise UsageError(f"rule {name!r} is {given!r}, expected settings such as {{rule: best-of, n: 8}}, or {{}}")
    own = {str(key).replace("-", "_"): value for key, value in (given or {}).items()}
    kind = rule_names().get(own.get("rule", "stars"))
    fields = set() if kind is None else {field.name for field in dataclasses.fields(kind)}
    held = {key: value for key, value in shared.items() if key not in RULE_SETTINGS or key in fields}
    try:
        return settings_of({**held, **own}, {"rule"})
    except (ValueError, TypeError) as error:
        raise UsageError(f"rule {name!r}: {error}") from None


def judge_options(judge: Any) -> dict[str, Any] | None:
    """Return what is said of the judge, with its kind first; None where there is none."""
    if judge is None:
        return None
    if not isinstance(judge, Mapping):
        raise UsageError(f"judge is {judge!r}, expected one of {{reward-model: RM}}, {{function: module:function}}, "
                         "{endpoint: URL, model: NAME}")  # fmt: skip
    given = {str(key).replace("-", "_"): value for key, value in judge.items()}
    kinds = [kind for kind in OF_JUDGES if kind in given]
    if len(kinds) != 1:
        raise UsageError(
            f"judge has {' and '.join(kinds) or 'no kind'}, expected one of reward-model, function, endpoint"
        )
    known = {kinds[0], *OF_JUDGES[kinds[0]]}
    for name in given:
        if name not in known:
            raise UsageError(f"judge: {unknown_option(name, known, str(sorted(known)))}")
    return {kinds[0]: given.pop(kinds[0]), **given}


@contextmanager
def judge_of(given: Mapping[str, Any], loaded: Loaded, options: Mapping[str, Any]) -> Iterator[Any]:
    """Make the judge; a reward model shares the language model with the rules' engine."""
    kind, name = next(iter(given.items()))
    more = {key: value for key, value in given.items() if key != kind}
    if kind == "endpoint":
        yield EndpointJudge(name, **{"model": None, **more})
    elif kind == "function":
        yield FunctionJudge(function_of("judge: function", name), str(name), **more)
    else:
        reward = reward_of(as_list(name), device_of(options.get("device")), dtype_of(options.get("dtype")))
        with Engine(loaded.model, reward, tokenizer=loaded.tokenizer, prefix_cache=0, pack=False) as engine:
            yield RewardJudge(engine)


def _show(found: Comparison) -> None:
    """Print a table; where some prompts or verdicts are missing, the exit code is 1."""
    judged = any(one.against_plain is not None for one in found.figures)
    base = next(one for one in found.figures if one.rule == BASE)
    told_base = f"; plain sampling's mean reward is {base.reward.mean:.3f}" if base.reward else ""
    table = Table(title=f"{found.prompts} prompts{told_base}", box=SIMPLE, padding=(0, 1))
    table.add_column("rule", overflow="fold", min_width=10)
    for head in ("gain (95 %)", *(["win rate (95 %)"] if judged else []), "tokens", "seconds"):
        table.add_column(head, justify="right", no_wrap=True)
    for one in found.figures:
        wins = [told(one.against_plain.win_rate if one.against_plain else None, kind=".0%")] if judged else []
        costs = [number(one.sampled, ".0f"), number(one.seconds, ".3g")]
        table.add_row(escape(one.rule), told(one.gain, "+"), *wins, *costs)
    Console().print(table)
    stderr.print(f"tables and pictures: {escape(str(found.folder / 'comparison.md'))}", soft_wrap=True)
    stderr.print(f"to look at the answers: stars report {escape(str(found.folder))}", soft_wrap=True)
    if found.left:
        stderr.print(f"{found.left} answers are left: the same command goes on")
    if found.errors:
        stderr.print(f"{found.errors} answers or verdicts failed: --retry tries those again")
    if found.left or found.errors:
        raise typer.Exit(1)
