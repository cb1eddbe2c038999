"""Whole rounds of the engine, eager and from CUDA graphs, and the same work by `generate` and by the naive loop."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.first import roofline
from bench.first.clock import Clock, Timing
from bench.first.figures import Figure, duration
from bench.first.roofline import SEGMENT, SIZES, Shape
from bench.first.setting import SEED, Setting
from bench.report import CheckError
from demo.naive import generate_options, naive_decode
from stars_kernels import Engine, StarsConfig
from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.scheduler import Run
from stars_kernels.ops import segment_sample
from stars_kernels.ops.philox import request_key

ROUNDS = {"eager": 3, "graph": 6}
FIRST = {"eager": 1, "graph": 2}
"""Rounds that are not of the median: kernels are compiled, graphs captured."""
TOKENS_THAT_AGREE = 0.6
"""At least, with those of a plain forward in bf16: near ties of the draw and of the k-th logit fall either way."""
REWARD_TOLERANCE = 0.25
"""Of rewards of about 1 in size, in bf16."""
NAIVE_ATTEMPTS = 2


def settings(shape: Shape, rounds: int) -> StarsConfig:
    """Let every round accept its first attempt, so that each is whole: it reads, draws, scores, judges, commits."""
    return StarsConfig(
        segment_size=SEGMENT, max_new_tokens=SEGMENT * rounds, batch_size=shape.prompts,
        width=shape.width, wave=shape.width, temperature=1.0, top_k=40, seed=SEED, eos_token_id=(), progress=False,
        accept="hard", alpha=1.0, reward_threshold=-1e6, beta=1.0,
    )  # fmt: skip


class Stopwatch:
    """Times the parts of a run: seconds of each call, the device's work included."""

    def __init__(self, run: Run, clock: Clock, graph: bool) -> None:
        self._clock = clock
        proposer: Any = run.round.proposer
        if not graph:
            proposer.graphs = None
        elif proposer.graphs is None:
            raise CheckError("the engine makes no CUDA graphs here")
        self.capture = self._timed(proposer.graphs, "capture") if graph else []
        self.segment = self._timed(proposer, "_segment_of_graphs" if graph else "_segment")
        self.propose, self.score = self._timed(proposer, "propose"), self._timed(run.round.scorer, "score")
        self._commits = self._timed(proposer, "commit"), self._timed(run.round.scorer, "commit")

    @property
    def commit(self) -> list[float]:
        """Of both models."""
        return list(map(sum, zip(*self._commits, strict=True)))

    def _timed(self, place: Any, name: str) -> list[float]:
        """Put a method that is timed in the place of an object's own; returns what gets its seconds."""
        inner, seconds = getattr(place, name), list[float]()

        def timed(*args: Any, **options: Any) -> Any:
            took, result = self._clock.whole(lambda: inner(*args, **options))
            seconds.append(took)
            return result

        setattr(place, name, timed)
        return seconds


@torch.inference_mode()
def rounds(setting: Setting, name: str, shape: Shape, how: str) -> Iterator[Figure]:
    """Decode a few rounds, `how` is "eager" or "graph"; check the answers; tell a round, its parts and its model step.

    The answers are those of graphs and eager segments alike, and of plain forwards over the same texts.
    """
    m, clock, graph = SIZES[name], setting.clock, how == "graph"
    model, rm = setting.load(name)
    prompts, config = setting.prompts(name, shape), settings(shape, ROUNDS[how])
    ids, seconds = range(len(prompts)), list[float]()
    with (
        Engine(model, rm, config=config, graphs=graph, prefix_cache=0) as engine,
        engine.open_run(prompts, request_ids=ids) as run,
    ):
        parts, turns = Stopwatch(run, clock, graph), run.rounds()
        for _ in range(ROUNDS[how]):
            took, turn = clock.whole(lambda: next(turns, None))
            if turn is None:
                break
            seconds.append(took)
    answers = run.answers
    if error := next((answer.error for answer in answers if answer.error is not None), None):
        raise error
    if len(seconds) != ROUNDS[how]:
        raise CheckError(f"{len(seconds)} rounds were decoded, expected {ROUNDS[how]}")
    tokens = [answer.tokens for answer in answers]
    agreement = check_answers(setting, name, answers)
    check_modes(setting, name, shape, how, tokens)

    what, skip = f"{name}: {how} round, {shape}", FIRST[how]
    whole = Timing.of(seconds[skip:])
    yield duration(what, whole, "ms", roofline.whole_seconds(setting.gpu, m, shape, graph=graph))
    yield Figure(f"{what}, tokens", shape.prompts * SEGMENT / whole.median, "tokens/s",
                 note="aligned, where each segment takes one round")  # fmt: skip
    step = Timing.of([s / (SEGMENT - 1) for s in parts.segment[skip:]])
    phase = partial(roofline.phase_seconds, setting.gpu, m, shape, graph=graph)
    segment = phase("segment")
    yield duration(f"{what}, model step", step, "ms", segment and segment / (SEGMENT - 1), "a forward and its draw")
    if graph:
        note = "once an engine, rows and length, while its buffers stay"
        yield duration(f"{what}, capture", Timing.of(parts.capture), "s", note=note)
    last = phase("last token")
    expected = {"propose": segment and last and segment + last, "score": phase("RM"), "commit": None}
    for part, found in {"propose": parts.propose, "score": parts.score, "commit": parts.commit}.items():
        yield duration(f"{what}, {part}", Timing.of(found[skip:]), "ms", expected[part])
    read = roofline.prefill_seconds(setting.gpu, m, shape)
    yield duration(f"{what}, first", Timing.of(seconds[:1]), "ms", note="kernels not met before are compiled in it")
    prefill = Timing.of([run.seconds["prefill"]])
    yield duration(f"{what}, prompts", prefill, "ms", read, "read by both models")
    note = f"with draws from plain forwards; at least {TOKENS_THAT_AGREE}"
    yield Figure(f"{what}, tokens that agree", agreement, "share", note=note)


def check_answers(setting: Setting, name: str, answers: list[Answer]) -> float:
    """Return the share of tokens that are drawn from plain forwards too; rewards must be those of a plain forward.

    Each text is read once: a token is drawn anew from the logits behind all before it.
    """
    model, rm = setting.load(name)
    config, same, count = settings(Shape(1, 1, 1), 1), 0, 0
    for p, answer in enumerate(answers):
        ids = torch.tensor([[*answer.prompt, *answer.tokens]], device=setting.device)
        tokens = ids[0, len(answer.prompt) :]
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(tokens) + 1).logits[0, :-1]
        position = torch.arange(len(tokens), device=setting.device)
        keys = torch.full_like(position, request_key(SEED, p))
        drawn, _ = segment_sample(logits, keys, torch.zeros_like(position), position, **config.sampling)
        same, count = same + int((drawn == tokens).sum()), count + len(tokens)
        expected = float(rm(input_ids=ids, use_cache=False).logits[0, 0])
        if not abs(answer.reward - expected) <= REWARD_TOLERANCE:
            raise CheckError(
                f"{name}, prompt {p}: the reward is {answer.reward:.4f}, of a plain forward {expected:.4f}"
            )
    if same < TOKENS_THAT_AGREE * count:
        raise CheckError(
            f"{name}: {same} of {count} tokens agree with plain forwards, expected {TOKENS_THAT_AGREE:.0%}"
        )
    return same / count


def check_modes(setting: Setting, name: str, shape: Shape, how: str, tokens: list[list[int]]) -> None:
    """Raise CheckError where graphs and eager segments of the same rows, never padded, give other tokens.

    Eager rounds run again where this process has none: they failed, or ran before `--resume`.
    """
    key = (name, str(shape))
    if how == "eager":
        setting.answers[key] = tokens
        return
    if key not in setting.answers:
        for _ in rounds(setting, name, shape, "eager"):
            pass
    for p, (found, expected) in enumerate(zip(tokens, setting.answers[key], strict=True)):
        shared = min(len(found), len(expected))
        if found[:shared] != expected[:shared]:
            raise CheckError(f"{name}, {shape}, prompt {p}: graphs give {found[:shared]}, eager {expected[:shared]}")


@torch.inference_mode()
def generate(setting: Setting, name: str, shape: Shape) -> Iterator[Figure]:
    """Time transformers' own decoding of a round's rows: no reward, no rejection."""
    model, _ = setting.load(name)
    ids = torch.tensor(setting.prompts(name, shape), device=setting.device).repeat_interleave(shape.width, dim=0)
    options = {**generate_options(settings(shape, 1)), "max_new_tokens": SEGMENT, "eos_token_id": None}

    def work() -> Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    work()  # warms up
    seconds, output = setting.clock.whole(work)
    expected = (shape.rows, shape.prompt_tokens + SEGMENT)
    if output.shape != expected or not torch.equal(output[:, : shape.prompt_tokens], ids):
        raise CheckError(f"generate gave {list(output.shape)}, expected the prompts and {SEGMENT} tokens, {expected}")
    note = "reads the prompts for each row; no rewards"
    yield duration(f"{name}: generate, {shape}", Timing.of([seconds]), "ms", note=note)


@torch.inference_mode()
def naive(setting: Setting, name: str, shape: Shape) -> Iterator[Figure]:
    """Time the naive loop on one prompt, an attempt at a time, and a round's attempts at this rate."""
    model, rm = setting.load(name)
    prompt = setting.prompts(name, shape)[0]
    # Never accepted: every attempt is made, and the best is taken.
    config = settings(shape, 1).replace(max_attempts=NAIVE_ATTEMPTS, reward_threshold=1e6)
    key = request_key(SEED, 0)
    seconds, answer = setting.clock.whole(lambda: naive_decode(model, rm, prompt, config, key, seeded=False))
    attempts = [segment.attempts for segment in answer.segments]
    if (len(answer.tokens), attempts) != (SEGMENT, [NAIVE_ATTEMPTS]):
        raise CheckError(
            f"the naive loop gave {len(answer.tokens)} tokens after {attempts} attempts, "
            f"expected {SEGMENT} after {[NAIVE_ATTEMPTS]}"
        )
    timing = Timing.of([seconds / NAIVE_ATTEMPTS])
    yield duration(f"{name}: naive loop, an attempt", timing, "ms", note="generate, and the reward of the whole text")
    for rows in setting.shapes(name):
        whole = Timing.of([timing.median * rows.rows])
        yield duration(f"{name}: naive loop, {rows}", whole, "ms", note=f"{rows.rows} attempts at this rate")
