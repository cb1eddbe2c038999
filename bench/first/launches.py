"""Microbenchmarks: memory, matrix products, each op at the shapes of a round, and what a launch costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import stars_kernels
from bench.first import roofline
from bench.first.clock import Timing
from bench.first.figures import Figure, duration, rate
from bench.first.roofline import SEGMENT, SIZES, Kernel, Shape
from bench.first.setting import DTYPE, Setting
from bench.ops import assert_no_worse
from bench.report import CheckError
from stars_kernels import ops

COPY_BYTES = {"cpu": 16 * 2**20, "cuda": 2**30}
GEMM_ROWS = (1, 20, 64, 192, 2880)
"""One row; one prompt's width; 64 prompts' last tokens; their rows; these rows' segments."""
GAP_KERNELS = (100, 1000)
HELD = SEGMENT // 2 + 1
"""Tokens of a row in the middle step of a segment, its own included."""
KEY = 2**40
OPS = ("fork_attention", "segment_sample", "lm_head_sample", "reward_head", "kv_commit", "accept")


class LeftOut(Exception):
    """A part has nothing to measure here, and says why."""


def copy(setting: Setting) -> Iterator[Figure]:
    """Read and write memory."""
    size = COPY_BYTES[setting.kind]
    source = setting.noise(size // DTYPE.itemsize)
    target = torch.empty_like(source)
    timing = setting.clock.launched(lambda _: target.copy_(source))
    if not torch.equal(target, source):
        raise CheckError("the copy differs from its source")
    expected = roofline.bandwidth(setting.datasheet)
    setting.rates["copy"] = 2 * size / timing.low
    yield rate("copy", 2 * size / 1e9, timing, "GB/s", expected and expected / 1e9, "read and written")


def gemm(setting: Setting, name: str) -> Iterator[Figure]:
    """Multiply with the weights of a layer and of the output layer."""
    m = SIZES[name]
    shapes = {
        "q": (m.query_size, m.hidden), "k": (m.kv_size, m.hidden), "gate": (m.intermediate, m.hidden),
        "down": (m.hidden, m.intermediate), "head": (m.vocabulary, m.hidden),
    }  # fmt: skip
    found: list[tuple[str, Kernel, Timing]] = []
    for layer, (columns, depth) in shapes.items():
        copies = setting.copies(columns * depth * DTYPE.itemsize)
        weights = setting.noise(copies, columns, depth, scale=depth**-0.5)
        for rows in GEMM_ROWS:
            if layer == "head" and rows == max(GEMM_ROWS):
                continue  # no logits are wanted there
            x = setting.noise(rows, depth, seed=1)

            def product(turn: int, x: Tensor = x, weights: Tensor = weights) -> Tensor:
                return F.linear(x, weights[turn])

            check_product(product(0)[:, :8], x, weights[0, :8])
            found.append((f"{layer} {columns} x {depth}, M = {rows}", roofline.linear(rows, columns, depth),
                          setting.clock.bare(product, copies)))  # fmt: skip
    best = max(kernel.flops / timing.low for _, kernel, timing in found)
    setting.rates["gemm"] = max(best, setting.rates.get("gemm", 0.0))  # before the roofline is asked
    for what, kernel, timing in found:
        seconds = roofline.call_seconds(setting.gpu, kernel, graph=True)
        tera, giga = kernel.flops / 1e12, kernel.bytes / 1e9
        what = f"{name}: gemm {what}"
        yield rate(f"{what}, operations", tera, timing, "TFLOP/s", seconds and tera / seconds)
        yield rate(f"{what}, bytes", giga, timing, "GB/s", seconds and giga / seconds)


def check_product(found: Tensor, x: Tensor, weight: Tensor) -> None:
    """Raise CheckError where x [M, D] weight [N, D]^T is further from float64 than its dtype allows."""
    truth = F.linear(x.double(), weight.double())
    assert_no_worse(found, truth.to(found.dtype), truth)


@dataclass(frozen=True)
class Case:
    """An op's call at one shape. `run` takes the number of a copy of the data; `check` raises where it is wrong."""

    name: str
    run: Callable[[int], Any]
    check: Callable[[int], None]
    kernel: Kernel
    copies: int


def kernel(setting: Setting, name: str, op: str) -> Iterator[Figure]:
    """Check, then time, one op at the shapes of a round: launched by the host, in a graph, and its bytes a second."""
    served = stars_kernels.backends()[op][setting.kind]
    if served.startswith("definition"):
        missing = setting.kind == "cuda"
        raise (CheckError if missing else LeftOut)(f"{op} is served by its {served}; definitions are not timed")
    copied = setting.rates.get("copy")
    for case in CASES[op](setting, name):
        what = f"{name}: {case.name}"
        for turn in (0, case.copies - 1):
            try:
                case.check(turn)
            except (CheckError, AssertionError) as error:
                raise CheckError(f"{what}, not timed: {error}") from error

        def expected(graph: bool, case: Case = case) -> float | None:
            return roofline.call_seconds(setting.gpu, case.kernel, graph=graph)

        timing = setting.clock.launched(case.run, case.copies)
        yield duration(f"{what}, launched", timing, "us", expected(graph=False), f"served by {served}")
        if setting.kind == "cuda":
            timing = setting.clock.replayed(case.run, case.copies)
            yield duration(f"{what}, in a graph", timing, "us", expected(graph=True))
        giga = case.kernel.bytes / 1e9
        yield rate(f"{what}, bytes", giga, timing, "GB/s", copied and copied / 1e9, "beside the copy measured here")


def draws_of(setting: Setting, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, attempts and positions of the rows, [R] each."""
    rows = torch.arange(shape.rows, device=setting.device)
    return rows + KEY, rows, torch.zeros_like(rows)


def attention_cases(setting: Setting, name: str) -> Iterator[Case]:
    m = SIZES[name]
    for shape in setting.shapes(name):
        for what, steps, held in (("step", 1, HELD), ("RM", SEGMENT, SEGMENT)):
            kernel = roofline.kernels(m, shape)[f"{what}: fork_attention"]
            copies = setting.copies(int(kernel.bytes))
            slots = shape.prompts * shape.prefix
            query = setting.noise(copies, shape.rows, steps, m.heads, m.head_dim)
            arena = setting.noise(copies, 2, slots, m.kv_heads, m.head_dim, seed=1)
            suffix = setting.noise(copies, 2, shape.rows, SEGMENT, m.kv_heads, m.head_dim, seed=2)
            yield attention_case(f"fork_attention {what}, {shape}", shape, query, arena, suffix, held, kernel)


def attention_case(
    what: str, shape: Shape, query: Tensor, arena: Tensor, suffix: Tensor, held: int, kernel: Kernel
) -> Case:
    """query [copies, R, S, Hq, D], arena [copies, 2, N, Hkv, D], suffix [copies, 2, R, T, Hkv, D]."""
    rows, steps, size = query.shape[1], query.shape[2], query.shape[4]
    prompts = torch.arange(shape.prompts, device=query.device)
    fixed = {
        "suffix_len": torch.full((rows,), held, device=query.device),
        "query_len": torch.full((rows,), steps, device=query.device),
        "offsets": prompts * shape.prefix, "lengths": torch.full_like(prompts, shape.prefix),
        "prompt": prompts.repeat_interleave(shape.width), "scale": size**-0.5,
    }  # fmt: skip

    def attend(query: Tensor, suffix: Tensor, arena: Tensor) -> Tensor:
        own = {"suffix_key": suffix[0], "suffix_value": suffix[1]}
        return ops.fork_attention(query, **own, arena_key=arena[0], arena_value=arena[1], **fixed)

    def run(turn: int) -> Tensor:
        return attend(query[turn], suffix[turn], arena[turn])

    def check(turn: int) -> None:
        found = run(turn)
        with stars_kernels.reference():
            definition = run(turn)
            truth = attend(query[turn].double(), suffix[turn].double(), arena[turn].double())
        assert_no_worse(found, definition, truth)

    return Case(what, run, check, kernel, len(query))


def sample_cases(setting: Setting, name: str) -> Iterator[Case]:
    m = SIZES[name]
    for shape in setting.shapes(name):
        for what, read, options in (
            ("top-k 40", shape.rows, {"top_k": 40}), ("temperature", shape.rows, {}),
            ("top-k 40, first token", shape.prompts, {"top_k": 40}),
        ):  # fmt: skip
            filtered, first = bool(options), read != shape.rows
            phase = "first token" if first else "step"
            kernel = roofline.kernels(m, shape, filtered=filtered)[f"{phase}: segment_sample"]
            copies = setting.copies(read * m.vocabulary * DTYPE.itemsize)
            logits = setting.noise(copies, read, m.vocabulary, scale=2.5)
            draws = draws_of(setting, shape)
            source = draws[1] // shape.width if first else None

            def run(turn: int, logits: Tensor = logits, draws: Any = draws, source: Any = source,
                    options: dict[str, Any] = options) -> tuple[Tensor, Tensor]:  # fmt: skip
                return ops.segment_sample(logits[turn], *draws, source=source, temperature=0.8, **options)

            yield Case(f"segment_sample {what}, {shape}", run, same_draws(run, 0, 1e-4), kernel, copies)


def head_sample_cases(setting: Setting, name: str) -> Iterator[Case]:
    m = SIZES[name]
    copies = setting.copies(m.vocabulary * m.hidden * DTYPE.itemsize)
    weight = setting.noise(copies, m.vocabulary, m.hidden, scale=2.5 * m.hidden**-0.5)
    for shape in setting.shapes(name):
        kernel = roofline.kernels(m, shape, filtered=False, fused=True)["step: lm_head_sample"]
        hidden, draws = setting.noise(copies, shape.rows, m.hidden, seed=1), draws_of(setting, shape)

        def run(turn: int, hidden: Tensor = hidden, draws: Any = draws) -> tuple[Tensor, Tensor]:
            return ops.lm_head_sample(hidden[turn], weight[turn], *draws, temperature=0.8)

        # The product's rounding may decide a few draws; logits of up to 16 are rounded in the definition.
        yield Case(f"lm_head_sample, {shape}", run, same_draws(run, 1 + shape.rows // 8, 0.2), kernel, copies)


def same_draws(run: Callable[[int], tuple[Tensor, Tensor]], others: int, tolerance: float) -> Callable[[int], None]:
    """Return a check: tokens are the definition's but for `others` of them, log-probabilities too, to `tolerance`."""

    def check(turn: int) -> None:
        token, logprob = run(turn)
        with stars_kernels.reference():
            expected, expected_logprob = run(turn)
        same = token == expected
        if (~same).sum() > others:
            raise CheckError(f"tokens {token.tolist()}, by the definition {expected.tolist()}")
        torch.testing.assert_close(logprob[same], expected_logprob[same], rtol=0, atol=tolerance)

    return check


def reward_cases(setting: Setting, name: str) -> Iterator[Case]:
    m = SIZES[name]
    weight = setting.noise(m.hidden, seed=1, scale=m.hidden**-0.5)
    for shape in setting.shapes(name):
        kernel = roofline.kernels(m, shape)["RM: reward_head"]
        hidden = setting.noise(setting.copies(int(kernel.bytes)), shape.rows, SEGMENT, m.hidden)
        yield reward_case(f"reward_head, {shape}", hidden, weight, kernel)


def reward_case(what: str, hidden: Tensor, weight: Tensor, kernel: Kernel) -> Case:
    """hidden [copies, R, S, D], weight [D]."""
    last = torch.arange(hidden.shape[1], device=hidden.device) % hidden.shape[2]

    def run(turn: int) -> Tensor:
        return ops.reward_head(hidden[turn], last, weight)

    def check(turn: int) -> None:
        found = run(turn)
        with stars_kernels.reference():
            truth = ops.reward_head(hidden[turn].double(), last, weight.double())
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-4)

    return Case(what, run, check, kernel, len(hidden))


def commit_cases(setting: Setting, name: str) -> Iterator[Case]:
    m = SIZES[name]
    for shape in setting.shapes(name):
        suffix = setting.noise(m.layers, 2, shape.rows, SEGMENT, m.kv_heads, m.head_dim)
        kernel = roofline.kernels(m, shape)["LM, RM: kv_commit"]
        yield commit_case(f"kv_commit, {m.layers} layers, {shape}", shape, suffix, kernel)


def commit_case(what: str, shape: Shape, suffix: Tensor, kernel: Kernel) -> Case:
    """suffix: [L, 2, R, T, Hkv, D], of which each prompt keeps its last row."""
    capacity, prompt = shape.prefix + SEGMENT, torch.arange(shape.prompts, device=suffix.device)
    arena = suffix.new_zeros(*suffix.shape[:2], shape.prompts * capacity, *suffix.shape[4:])
    lengths, count = torch.full_like(prompt, shape.prefix), torch.full_like(prompt, SEGMENT)
    places = (prompt * capacity, prompt, prompt * shape.width + shape.width - 1, count)
    stay, go = (torch.full_like(prompt, move, dtype=torch.bool) for move in (False, True))

    def run(_: int) -> None:
        ops.kv_commit(suffix, arena, lengths, *places, stay)  # again and again to the same slots

    def check(_: int) -> None:
        found, expected = ((arena.clone(), lengths.clone()) for _ in range(2))
        ops.kv_commit(suffix, *found, *places, go)
        with stars_kernels.reference():
            ops.kv_commit(suffix, *expected, *places, go)
        if not all(map(torch.equal, found, expected)):
            raise CheckError("the arena or the lengths are not the definition's")

    return Case(what, run, check, kernel, 1)


def accept_cases(setting: Setting, name: str) -> Iterator[Case]:
    for shape in setting.shapes(name):
        rewards = setting.noise(shape.prompts, shape.width).float()
        kernel = Kernel("accept", 17 * rewards.numel() + 56 * len(rewards))  # the engine decides on the host
        yield accept_case(f"accept, {shape}", rewards, kernel)


def accept_case(what: str, rewards: Tensor, kernel: Kernel) -> Case:
    """rewards: [P, W]."""
    thresholds = torch.ones_like(rewards, dtype=torch.float64)
    first = torch.zeros(len(rewards), dtype=torch.int64, device=rewards.device)
    columns = (rewards, torch.ones_like(rewards, dtype=torch.bool), thresholds, first + KEY, first, first)
    state = torch.full_like(thresholds[:, 0], -torch.inf), first - 1  # the best so far, written in place

    def decide(best: Tensor, attempt: Tensor) -> tuple[Tensor, Tensor]:
        return ops.accept(*columns, best, attempt, max_attempts=20, beta=0.5)

    def check(_: int) -> None:
        found, expected = ([part.clone() for part in state] for _ in range(2))
        found += decide(*found)
        with stars_kernels.reference():
            expected += decide(*expected)
        for a, b in zip(found, expected, strict=True):
            if not torch.equal(a, b):
                raise CheckError(f"decided {a.tolist()}, by the definition {b.tolist()}")

    return Case(what, lambda _: decide(*state), check, kernel, 1)


CASES: dict[str, Callable[[Setting, str], Iterator[Case]]] = {
    "fork_attention": attention_cases,
    "segment_sample": sample_cases,
    "lm_head_sample": head_sample_cases,
    "reward_head": reward_cases,
    "kv_commit": commit_cases,
    "accept": accept_cases,
}


def gap(setting: Setting) -> Iterator[Figure]:
    """Empty kernels: what one more costs inside a graph, and when the host launches it."""
    from bench.first.empty import empty  # needs Triton

    place = torch.zeros(1, device=setting.device)
    work = {"Triton": lambda _: empty[(1,)](place), "torch": lambda _: place.zero_()}
    few, many = GAP_KERNELS
    for name, launch in work.items():
        small, large = (setting.clock.replayed(launch, calls=calls) for calls in (few, many))
        slope = (large.median * many - small.median * few) / (many - few)
        note = f"slope from {few} to {many} kernels"
        yield Figure(f"gap of an empty kernel in a graph, {name}", slope * 1e6, "us", roofline.GAP_SECONDS * 1e6, note)
    for name, launch in work.items():
        seconds, _ = setting.clock.whole(lambda launch=launch: [launch(0) for _ in range(many)])
        timing = Timing.of([seconds / many])
        yield duration(f"launch of an empty kernel by the host, {name}", timing, "us", roofline.ISSUE_SECONDS)
