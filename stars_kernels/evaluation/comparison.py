"""Compare decoding rules on the same prompts, in a folder; the same call again goes on where it stopped."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stars_kernels.data.datasets import load_prompts
from stars_kernels.data.journal import write_whole
from stars_kernels.data.prompts import PromptLine
from stars_kernels.data.run import RESULTS, Line, Summary, locked, read_results, readable_prompts, run_file
from stars_kernels.decoder.calibration import calibrate, is_calibrated, with_target
from stars_kernels.decoder.checks import check_count_or_none
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.decoder.output import Calibration
from stars_kernels.decoder.rules import BestOf, Plain, Stars
from stars_kernels.decoder.serial import to_plain
from stars_kernels.evaluation.answers import read_answers
from stars_kernels.evaluation.figures import BASE, Figures, figures_of
from stars_kernels.evaluation.judges import Judge, RewardJudge, text_of
from stars_kernels.evaluation.plots import plot_rewards
from stars_kernels.evaluation.statistics import METHOD
from stars_kernels.evaluation.tables import PICTURES, to_csv, to_markdown
from stars_kernels.evaluation.verdicts import Outcome, Prompt, judge_all
from stars_kernels.extras import require
from stars_kernels.hf.engine import Config, Engine

RULES, VERDICTS, CALIBRATION = "rules", "verdicts.jsonl", "calibration.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Of a rule, which has a folder of that name."""
VERSION = 1
"""Of the form of comparison.json."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison has come to.

    figures: of each rule. prompts: that were to be answered under each rule. errors: answers and verdicts that failed.
    left: answers that are still to come. folder: where all of it lies.
    """

    figures: list[Figures]
    prompts: int
    errors: int
    left: int
    folder: Path


def compare(
    engine: Engine,
    prompts: Path | str,
    folder: Path | str,
    rules: Mapping[str, Config],
    *,
    judge: Judge | None = None,
    calibration: Calibration | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    retry: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Comparison:
    """Answer prompts under several rules, judge the answers against plain sampling's, and write tables and pictures.

    Each rule is a run of `run_file` in `folder/rules/NAME`. The folder also gets `calibration.json` (r* and beta, found
    once for all rules that have none of their own), `verdicts.jsonl` (what the judge said), `comparison.json`, `.md`
    and `.csv`, and `reward_tokens.svg` and `reward_seconds.svg`. The same call again goes on where the first one
    stopped, whatever stopped it; rules and prompts may be added. All figures are of everything in the folder.

    Args:
        engine: made with prefix_cache=0, so that no rule gains from what an earlier one has read. Its own settings hold
            for all rules, where these have none of their own.
        prompts: a file, or the name of a data set; see `load_prompts`.
        rules: settings by the name that the rule is to have. "plain" is plain sampling, with which the others are
            compared; it is added where it is missing. A seed that is None is 0.
        judge: a `RewardJudge`, `FunctionJudge` or `EndpointJudge`; None = there are no wins and losses.
        calibration: r* and beta for the rules that have none of their own; None = they are found from the prompts.
        limit: answer the file's first prompts alone, so many; a later call may answer more.
        overwrite: begin all runs anew. Verdicts on equal answers stay.
        retry: try prompts and verdicts again that failed.
        tell: is told in a sentence what begins.

    Raises:
        ValueError: a rule's name or settings are not usable, or its folder holds another run (what is different is
            named: give the rule another name, or overwrite).
        JudgeError: the judge failed. What was answered and judged is kept.
        ImportError: matplotlib is not installed.
        OSError: a file cannot be read or written; what was written is whole.
    """
    require("matplotlib", "eval")
    check_count_or_none("limit", limit)
    if judge is not None and judge.pairwise and engine.models.tokenizer is None:
        raise ValueError("the engine has no tokenizer, expected one: a judge of pairs reads texts")
    if engine.prefix_cache:
        raise ValueError(
            f"the engine has prefix_cache={engine.prefix_cache}, expected 0: else a rule would gain from what earlier "
            "ones have read"
        )
    tell, folder = tell or (lambda told: None), Path(folder)
    configs = _configs(engine, rules)
    lines = load_prompts(prompts)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        known = _calibration(engine, lines, folder, list(configs.values()), calibration, overwrite, tell)
        _warm_up(engine, lines[:limit], folder, configs, overwrite)
        summaries = dict[str, Summary]()
        for number, (name, config) in enumerate(configs.items(), 1):
            tell(f"rule {number} of {len(configs)}: {name}")
            config, own = _calibrated(engine, config, known)
            summaries[name] = run_file(
                engine, prompts, folder / RULES / name, config=config, calibration=own, limit=limit,
                overwrite=overwrite, retry=retry,
            )  # fmt: skip
        figures, pairs = _judged(engine, lines, folder, configs, judge, retry, tell)
        _write(engine, prompts, folder, configs, figures, pairs, judge, known)
    failed = sum(one.errors for one in summaries.values()) + sum(
        one.against_plain.failed for one in figures if one.against_plain
    )
    left = sum(one.prompts - one.answers - one.errors for one in summaries.values())
    return Comparison(figures, len(lines[:limit]), failed, left, folder)


def _configs(engine: Engine, rules: Mapping[str, Config]) -> dict[str, StarsConfig]:
    """Return the settings of each rule, plain sampling's among them."""
    configs = dict[str, StarsConfig]()
    added: Mapping[str, Config] = {} if BASE in rules else {BASE: {"rule": Plain()}}
    for name, given in {**added, **rules}.items():
        if not NAME.fullmatch(str(name)):
            raise ValueError(f"a rule's name is {name!r}, expected letters, digits, '.', '_' and '-': it is a folder's")
        try:
            config = engine.resolve(given, {})
        except (ValueError, TypeError) as error:
            raise ValueError(f"rule {name!r}: {error}") from None
        configs[str(name)] = config.replace(seed=0) if config.seed is None else config
    if type(configs[BASE].resolved_rule) is not Plain:
        raise ValueError(
            f"the rule {BASE!r} is {configs[BASE].resolved_rule!r}, expected plain sampling, with which the others are "
            "compared: give that rule another name"
        )
    return configs


def _calibration(
    engine: Engine,
    lines: Sequence[Line],
    folder: Path,
    configs: Sequence[StarsConfig],
    given: Calibration | None,
    overwrite: bool,
    tell: Callable[[str], None],
) -> Calibration | None:
    """Return r* and beta for the rules that have none: as given, as kept in the folder, or found now and kept."""
    path = folder / CALIBRATION
    if all(map(is_calibrated, configs)):
        return None
    if path.exists() and not overwrite:
        kept = Calibration.load(path)
        if given not in (None, kept):
            raise ValueError(
                f"{path} is another calibration than the one given, expected the same, or overwrite (--overwrite)"
            )
        given = kept
    base = engine.config.replace(rule=None, seed=configs[0].seed)
    if given is None:
        tell("calibrating r* and beta")
        given = engine.calibrate(readable_prompts(engine, lines, base.calibration_samples), config=base)
    engine.with_calibration(base, given)  # refuses that of other models
    write_whole(path, [(json.dumps(given.to_dict(), indent=2) + "\n").encode()])
    return given


def _calibrated(
    engine: Engine, config: StarsConfig, known: Calibration | None
) -> tuple[StarsConfig, Calibration | None]:
    """Return a rule's settings with r* and beta, and the calibration that they are from, if it has none of its own.

    Where a rule has an r*, a quantile or an acceptance of its own, the rest is found anew from the same rewards.
    """
    rule = config.resolved_rule
    if known is None or not isinstance(rule, Stars) or is_calibrated(config):
        return config, None
    quantile, acceptance = config.calibration_quantile, config.calibration_acceptance
    shared = (engine.config.calibration_quantile, engine.config.calibration_acceptance)
    if rule.reward_threshold is not None or (quantile, acceptance) != shared:
        target, beta = calibrate(config, known.rewards)
        known = replace(known, reward_threshold=target, beta=beta, quantile=quantile, acceptance=acceptance)
    return with_target(config, known.reward_threshold, known.beta), known


def _warm_up(
    engine: Engine, lines: Sequence[Line], folder: Path, configs: Mapping[str, StarsConfig], overwrite: bool
) -> None:
    """Decode a little, where something is left to decode: compiling is not to count as the first rule's time."""
    wanted = {line.id for line in lines if isinstance(line, PromptLine)}
    for name in configs:
        path = folder / RULES / name
        done = {row["custom_id"] for row in read_results(path)} if (path / RESULTS).exists() and not overwrite else ()
        if wanted - set(done):
            some = readable_prompts(engine, lines, 8)
            engine.decode(some, rule=BestOf(4), max_new_tokens=4, seed=0, progress=False, errors="return")
            return


def _judged(
    engine: Engine,
    lines: Sequence[Line],
    folder: Path,
    configs: Mapping[str, StarsConfig],
    judge: Judge | None,
    retry: bool,
    tell: Callable[[str], None],
) -> tuple[list[Figures], list[dict[str, Any]]]:
    """Judge what lies in the folder; return each rule's figures, and a row for each pair of answers."""
    runs = {name: read_answers(folder / RULES / name) for name in configs}
    answers = {name: found for name, (found, _) in runs.items()}
    base, outcomes = answers[BASE], dict[str, dict[int | str, Outcome]]()
    if judge is not None:
        tell("judging")
        prompts = _prompts(engine, lines, judge.pairwise)
        others = {name: found for name, found in answers.items() if name != BASE}
        progress = configs[BASE].progress
        outcomes = judge_all(judge, folder / VERDICTS, prompts, base, others, retry=retry, progress=progress)
    figures = [
        figures_of(
            name, found, len(errors), base, outcomes.get(name), is_base=name == BASE,
            tests=isinstance(configs[name].resolved_rule, Stars),
        )
        for name, (found, errors) in runs.items()
    ]  # fmt: skip
    pairs = [
        {
            "rule": name, "prompt": i, "reward": answer.reward, "plain_reward": base[i].reward,
            "length": len(answer.token_ids), "plain_length": len(base[i].token_ids),
            **(vars(outcomes[name][i]) if name in outcomes else {}),
        }
        for name, found in answers.items() if name != BASE for i, answer in found.items() if i in base
    ]  # fmt: skip
    return figures, pairs


def _prompts(engine: Engine, lines: Sequence[Line], as_text: bool) -> dict[int | str, Prompt]:
    """Return the prompts by their ids; as_text: whether they are to be read by people and the like."""
    tokenizer = engine.models.tokenizer
    decode = None if tokenizer is None else lambda ids: str(tokenizer.decode(ids))
    good = [line for line in lines if isinstance(line, PromptLine)]
    return {line.id: Prompt(line.prompt, text_of(line.prompt, decode) if as_text else "") for line in good}


def _write(
    engine: Engine,
    prompts: Path | str,
    folder: Path,
    configs: Mapping[str, StarsConfig],
    figures: Sequence[Figures],
    pairs: Sequence[Mapping[str, Any]],
    judge: Judge | None,
    known: Calibration | None,
) -> None:
    """Write tables and pictures, each in one step."""
    settings = {name: _calibrated(engine, config, known)[0] for name, config in configs.items()}
    data = {
        "version": VERSION,
        "prompts": str(prompts),
        "model": engine.models.fingerprint,
        "reward_model": engine.models.reward_fingerprint,
        "judge": None if judge is None else judge.identity,
        "intervals": METHOD,
        "calibration": None if known is None else known.to_dict(),
        "rules": {
            one.rule: {"settings": settings[one.rule].to_dict(), "figures": to_plain(one)} for one in figures
        },
        "pairs": to_plain(pairs),
    }  # fmt: skip
    shown = {name: str(config.resolved_rule) for name, config in settings.items()}
    texts = {
        "comparison.json": json.dumps(data, indent=1, ensure_ascii=False) + "\n",
        "comparison.csv": to_csv(figures),
        "comparison.md": to_markdown(figures, _facts(engine, prompts, settings[BASE], judge, known), shown),
    }
    for name, text in texts.items():
        write_whole(folder / name, [text.encode("utf-8", "backslashreplace")])
    guided = [name for name, config in settings.items() if isinstance(config.resolved_rule, Stars)]
    plot_rewards(folder / PICTURES["sampled tokens"], figures, "sampled", guided)
    plot_rewards(folder / PICTURES["seconds"], figures, "seconds", guided)


def _facts(
    engine: Engine, prompts: Path | str, config: StarsConfig, judge: Judge | None, known: Calibration | None
) -> list[str]:
    """Return what the tables' reader has to know first, in sentences."""
    facts = [
        f"Prompts: {prompts}. Answers have at most {config.max_new_tokens} tokens, the seed is {config.seed}. Language "
        f"model: {engine.models.fingerprint}. Reward model: {engine.models.reward_fingerprint}."
    ]
    if known is not None:
        facts.append(
            f"r\\* and beta are calibrated on {len(known.rewards)} plain continuations, for rules without their own."
        )
    if judge is None:
        facts.append("No judge was asked, so there are no wins and losses.")
    else:
        facts.append(f"Judge: {judge.name}.")
    if isinstance(judge, RewardJudge) and judge.engine.models.reward_fingerprint == engine.models.reward_fingerprint:
        facts.append("It is the reward model that guided the rules, so its verdicts are no evidence of their own.")
    return facts
