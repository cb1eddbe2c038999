"""Compare decoding rules at equal prompts: the reward of their answers, VADER's score, tokens and seconds.

    python -m demo.compare --write docs/comparison.md

Each rule answers the same prompts, which the reward model was not trained on, from the same seed. r* and beta are
calibrated once, on prompts that it was trained on. Answers are appended to --out as they come, and a second start with
the same settings goes on where the first one stopped. Prints the table.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

import stars_kernels
from demo.arguments import output_file, output_folder, whole
from demo.models import (
    ENCODER_TEMPLATE,
    load_encoder_reward_model,
    load_language_model,
    load_own_head,
    load_reward_model,
    vader,
)
from demo.prompts import CALIBRATION_PROMPTS, UNSEEN_PROMPTS, messages
from demo.report import Line, reading_of, rows, table, write
from stars_kernels import (
    Args,
    BestOf,
    BlockBestOf,
    Calibration,
    Cards,
    Engine,
    Plain,
    RewardModel,
    SpeculativeRejection,
    Stars,
    StarsConfig,
)
from stars_kernels.decoder.rules import Rule

AT_ONCE = 8
"""Prompts of a call: a batch of the engine's."""
RULES: dict[str, Callable[[dict[str, float]], Rule]] = {
    "plain": lambda target: Plain(),
    "best-of-2": lambda target: BestOf(2),
    "best-of-4": lambda target: BestOf(4),
    "best-of-8": lambda target: BestOf(8),
    "best-of-16": lambda target: BestOf(16),
    "block-best-of-4": lambda target: BlockBestOf(4),
    "adasearch": lambda target: BlockBestOf((8, 8, 4, 4, 4, 2, 1, 1)),  # as many as block-best-of-4 in 8 blocks
    "speculative-rejection": lambda target: SpeculativeRejection(16, keep=0.5),
    "cards": lambda target: Cards(**target),
    "args-1.5": lambda target: Args(10, w=1.5),  # a weight as in its paper, for rewards that spread wider than these
    "args-5": lambda target: Args(10, w=5.0),
    "stars": lambda target: Stars(**target),
    "stars-hard": lambda target: Stars(**target, accept="hard"),
}
"""Each made of the calibrated r* and beta."""
REWARDS = {
    "model": load_reward_model,
    "own-head": lambda lm: RewardModel(load_own_head()),
    "encoder": lambda lm: RewardModel(*load_encoder_reward_model(), template=ENCODER_TEMPLATE),
}


def load_engine(reward: str) -> Engine:
    """Load the language model and the reward model of this name, and warm them up."""
    lm, tokenizer = load_language_model()
    engine = Engine(lm, REWARDS[reward](lm), tokenizer=tokenizer, prefix_cache=0)  # the same prompts for each rule
    chats = [messages(prompt) for prompt in CALIBRATION_PROMPTS[:AT_ONCE]]
    engine.decode(chats, rule=BestOf(4), max_new_tokens=4, seed=0, progress=False)
    return engine


def run_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what all lines of a run have in common, and what their seconds depend on."""
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    return {
        "reward": args.reward,
        "seed": args.seed,
        "tokens": args.tokens,
        "machine": f"{cores}-core CPU" + ("" if threads == cores else f" ({threads} used)"),
        "versions": {
            "stars-kernels": stars_kernels.__version__,
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def refuse_changed(file: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """End the program where settings that `file` records are not the expected ones."""
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise SystemExit(
                f"{file} has {name} = {found.get(name)!r}, expected {expected.get(name)!r}: "
                "give another --out, or delete that folder"
            )


def open_run(folder: Path, settings: dict[str, Any], engine: Callable[[], Engine]) -> dict[str, Any]:
    """Return the date, settings and calibration of the run in `folder`; begin it where there is none."""
    file = folder / "run.json"
    if file.exists():
        run = json.loads(file.read_text())
        refuse_changed(file, run["settings"], settings)
        return run
    chats = [messages(prompt) for prompt in CALIBRATION_PROMPTS]
    calibration = engine().calibrate(
        chats,
        calibration_samples=2 * len(chats),
        seed=settings["seed"],
        max_new_tokens=settings["tokens"],
        progress=False,
    )
    run = {"date": date.today().isoformat(), "settings": settings, "calibration": calibration.to_dict()}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(run, indent=2) + "\n")
    return run


def read_lines(file: Path) -> list[Line]:
    """Read the lines of a run; one whose writing was cut short is taken off the file."""
    text = file.read_text() if file.exists() else ""
    whole_lines = text[: text.rfind("\n") + 1]
    if whole_lines != text:
        file.write_text(whole_lines)
    return [json.loads(line) for line in whole_lines.splitlines()]


def answer(engine: Engine, name: str, config: StarsConfig, prompts: list[str]) -> list[Line]:
    """Decode the prompts in one call; return a line for each."""
    began = time.perf_counter()
    outputs = engine.decode([messages(prompt) for prompt in prompts], config=config)
    seconds = (time.perf_counter() - began) / len(prompts)
    return [
        {
            "rule": name,
            "prompt": prompt,
            "reward": output.reward,
            "vader": vader(output.text),
            "sampled": output.counts.sampled,
            "judged": output.counts.judged,
            "rm_scored": output.counts.rm_scored,
            "attempts": output.counts.attempts,
            "seconds": seconds,
            "text": output.text,
            "settings": config.to_dict(),
        }
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def complete(
    file: Path, rules: dict[str, Rule], prompts: tuple[str, ...], settings: dict[str, Any], engine: Callable[[], Engine]
) -> dict[str, list[Line]]:
    """Return each rule's line of each prompt, in order; decode and append those that `file` does not have yet."""
    done = {(line["rule"], line["prompt"]): line for line in read_lines(file)}
    for name, rule in rules.items():
        config = StarsConfig(rule=rule, seed=settings["seed"], max_new_tokens=settings["tokens"], progress=False)
        for line in (line for line in done.values() if line["rule"] == name):
            refuse_changed(file, line["settings"], config.to_dict())
        missing = [prompt for prompt in prompts if (name, prompt) not in done]
        for start in range(0, len(missing), AT_ONCE):
            lines = answer(engine(), name, config, missing[start : start + AT_ONCE])
            with file.open("a") as out:
                out.write("".join(json.dumps(line) + "\n" for line in lines))
            done |= {(name, line["prompt"]): line for line in lines}
            count = sum((name, prompt) in done for prompt in prompts)
            print(f"{name}: {count} of {len(prompts)}, {lines[0]['seconds']:.2f} s each", file=sys.stderr, flush=True)
    return {name: [done[name, prompt] for prompt in prompts] for name in rules}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.compare", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--prompts",
        type=whole(1, len(UNSEEN_PROMPTS)),
        default=len(UNSEEN_PROMPTS),
        help="how many unseen prompts (default all)",
    )
    parser.add_argument("--tokens", type=whole(1), default=120, help="tokens of an answer, at most (default 120)")
    parser.add_argument(
        "--rules", nargs="+", choices=RULES, default=list(RULES), help="which of them (default all); plain always is"
    )
    parser.add_argument("--reward", choices=REWARDS, default="model", help="which of the demo's (default model)")
    parser.add_argument("--seed", type=int, default=0, help="of every random number (default 0)")
    parser.add_argument(
        "--out", type=output_folder, default="out/compare", help="where answers are kept (default out/compare)"
    )
    parser.add_argument(
        "--write", type=output_file, metavar="FILE", help="write the table and a plot beside it, which ends in .svg"
    )
    return parser.parse_args(argv)


def command_of(args: argparse.Namespace) -> str:
    """Return the command that gives the same result anew: options that have not their default value."""
    words = ["python -m demo.compare"]
    for name in ("prompts", "tokens", "rules", "reward", "seed"):
        value, default = getattr(args, name), getattr(parse([]), name)
        if value != default:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join([*words, "--write", str(args.write)])


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.write:
        reading_of(args.write)  # refused before anything is decoded
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    engine = cache(lambda: load_engine(args.reward))
    run = open_run(args.out, run_settings(args), engine)
    calibration = Calibration.from_dict(run["calibration"])
    target = {"reward_threshold": calibration.reward_threshold, "beta": calibration.beta}
    names = [name for name in RULES if name in {"plain", *args.rules}]
    rules = {name: RULES[name](target) for name in names}
    answers = complete(args.out / "answers.jsonl", rules, UNSEEN_PROMPTS[: args.prompts], run["settings"], engine)
    found = rows(answers)
    print(table(found))
    if args.write:
        write(args.write, found, rules, run, calibration, args.prompts, command_of(args))


if __name__ == "__main__":
    main()
