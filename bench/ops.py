"""ops: each compiled op against what transformers or plain torch would do in its place.

Each case holds several layers' worth of data, more than the caches hold, and a call takes the next one: in a decode, an
op finds its data in memory, not in a cache that the last call warmed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import stars_kernels
from bench.common import check_triton
from bench.machine import Rates, wait
from bench.report import CheckError, Row
from stars_kernels import ops
from stars_kernels.ops.content_hash import content_hash_ref

ROWS = 16
DATA_BYTES = {"cpu": 96 * 2**20, "cuda": 256 * 2**20}
"""Of a case's layers together, counted on our side: several times the last-level cache of a desktop CPU, of a GPU."""
MAX_LAYERS = 30
CUDA_CALLS = 10
"""Calls of one timing on a GPU, between two events: their launches are in it, waiting for the result is not."""
SEED = 0


@dataclass
class Case:
    """One comparison. ours and theirs take the number of a layer; check(layer) raises where ours is wrong."""

    name: str
    against: str
    layers: int
    ours: Callable[[int], Any]
    theirs: Callable[[int], Any]
    check: Callable[[int], None]
    bytes_moved: int
    """That no implementation can avoid reading or writing."""
    flops: int = 0
    target: float | None = None


def layers_for(layer_bytes: int, device: str) -> int:
    return max(2, min(MAX_LAYERS, -(-DATA_BYTES[device] // layer_bytes)))


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


# fork_attention


def attention_case(
    heads: int, kv_heads: int, size: int, prefix: int, steps: int, dtype: torch.dtype, device: str = "cpu"
) -> Case:
    """ROWS rows of one prompt, `steps` new tokens each, against scaled_dot_product_attention on a cache that already
    holds the prefix ROWS times."""
    g = torch.Generator().manual_seed(SEED)
    held, slots = (8, 16) if steps == 1 else (steps, steps)
    layers = layers_for(2 * prefix * kv_heads * size * dtype.itemsize, device)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    query = noise(ROWS, steps, heads, size)
    arena, suffix = noise(layers, 2, prefix, kv_heads, size), noise(layers, 2, ROWS, slots, kv_heads, size)
    arguments = {
        "suffix_len": torch.full((ROWS,), held, device=device), "query_len": torch.full((ROWS,), steps, device=device),
        "offsets": torch.tensor([0], device=device), "lengths": torch.tensor([prefix], device=device),
        "prompt": torch.zeros(ROWS, dtype=torch.int64, device=device),
    }  # fmt: skip
    shared = arena.unsqueeze(2).expand(-1, -1, ROWS, -1, -1, -1)
    repeated = torch.cat((shared, suffix[:, :, :, :held]), dim=3).transpose(3, 4).contiguous()
    mask = None if steps == 1 else torch.ones(steps, prefix + steps, dtype=torch.bool, device=device).tril(prefix)

    def ours(layer: int) -> Tensor:
        own, shared = suffix[layer], arena[layer]
        return ops.fork_attention(
            query, own[0], own[1], arena_key=shared[0], arena_value=shared[1], scale=size**-0.5, **arguments
        )

    def theirs(layer: int) -> Tensor:
        return sdpa(query, *repeated[layer])

    def sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True)

    def check(layer: int) -> None:
        truth = sdpa(query.double(), *repeated[layer].double())
        assert_no_worse(ours(layer).transpose(1, 2), theirs(layer), truth)

    what = "decode" if steps == 1 else f"score {steps}"
    return Case(
        f"fork_attention {what} {heads}/{kv_heads}x{size} prefix {prefix} {dtype_name(dtype)}",
        "sdpa, cache repeated", layers, ours, theirs, check,
        bytes_moved=2 * kv_heads * size * (prefix + ROWS * held) * dtype.itemsize,
        flops=4 * ROWS * steps * heads * size * (prefix + held),
        target={128: 1.0, 1024: 3.0, 4096: 5.0}[prefix] if steps == 1 else None,
    )  # fmt: skip


def assert_no_worse(found: Tensor, rival: Tensor, truth: Tensor) -> None:
    """`found` is about as near `truth`, in float64, as the rival's result is (root mean square)."""
    error, theirs = ((x.double() - truth).square().mean().sqrt().item() for x in (found, rival))
    allowed = 1.5 * theirs + torch.finfo(found.dtype).eps * truth.square().mean().sqrt().item()
    if not error <= allowed:
        raise CheckError(f"error {error:.3g}, theirs {theirs:.3g}, allowed {allowed:.3g}")


# segment_sample

FILTERS: dict[str, tuple[dict[str, Any], float]] = {
    "temperature": ({"temperature": 0.8}, 1.5),
    "temperature, top-k": ({"temperature": 0.8, "top_k": 40}, 2.0),
    "temperature, top-k, top-p": ({"temperature": 0.8, "top_k": 40, "top_p": 0.95}, 10.0),
}


def sampling_case(vocabulary: int, filters: str, dtype: torch.dtype, device: str = "cpu") -> Case:
    """ROWS rows of logits, against transformers' warpers, softmax and torch.multinomial."""
    options, target = FILTERS[filters]
    g = torch.Generator().manual_seed(SEED)
    layers = layers_for(ROWS * vocabulary * dtype.itemsize, device)
    logits = (torch.randn(layers, ROWS, vocabulary, generator=g) * 2.5).to(device, dtype)
    keys = torch.randint(2**62, (ROWS,), generator=g).to(device)
    rows = torch.arange(ROWS, device=device)
    warpers: list[Any] = [TemperatureLogitsWarper(options["temperature"])]
    if "top_k" in options:
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(TopPLogitsWarper(options["top_p"]))

    def ours(layer: int) -> tuple[Tensor, Tensor]:
        return ops.segment_sample(logits[layer], keys, rows, rows + layer, **options)

    def warped(scores: Tensor) -> Tensor:
        for warper in warpers:
            scores = warper(None, scores)
        return scores

    def theirs(layer: int) -> Tensor:
        scores = warped(logits[layer].float())  # as `generate` does
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1)

    def check(layer: int) -> None:
        token, logprob = ours(layer)
        with stars_kernels.reference():
            expected, expected_logprob = ours(layer)
        if not torch.equal(token, expected):
            raise CheckError(f"tokens {token.tolist()}, by the definition {expected.tolist()}")
        truth = warped(logits[layer].double()).log_softmax(dim=-1).gather(1, token[:, None])[:, 0]
        assert_no_worse(logprob, expected_logprob, truth)  # whose sum over the vocabulary depends on the processor

    return Case(
        f"segment_sample {filters}, {vocabulary} {dtype_name(dtype)}", "warpers + multinomial", layers,
        ours, theirs, check, bytes_moved=ROWS * vocabulary * dtype.itemsize, target=target,
    )  # fmt: skip


# lm_head_sample


def output_case(vocabulary: int, size: int, dtype: torch.dtype, device: str = "cpu") -> Case:
    """Output layer and draw of ROWS rows at a temperature alone, against the layer, transformers' warper, softmax and
    torch.multinomial."""
    g = torch.Generator().manual_seed(SEED)
    layers = layers_for(vocabulary * size * dtype.itemsize, device)
    hidden = torch.randn(layers, ROWS, size, generator=g).to(device, dtype)
    weight = (torch.randn(layers, vocabulary, size, generator=g) * (2.5 / size**0.5)).to(device, dtype)
    keys = torch.randint(2**62, (ROWS,), generator=g).to(device)
    rows = torch.arange(ROWS, device=device)
    warper = TemperatureLogitsWarper(0.8)

    def ours(layer: int) -> tuple[Tensor, Tensor]:
        return ops.lm_head_sample(hidden[layer], weight[layer], keys, rows, rows + layer, temperature=0.8)

    def theirs(layer: int) -> Tensor:
        scores = warper(None, F.linear(hidden[layer], weight[layer]).float())
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1)

    def check(layer: int) -> None:
        token, logprob = ours(layer)
        with stars_kernels.reference():
            expected, expected_logprob = ours(layer)
        same = token == expected
        if (~same).sum() > ROWS // 8:  # the product's rounding may decide a few
            raise CheckError(f"tokens {token.tolist()}, by the definition {expected.tolist()}")
        atol = 1e-4 if dtype == torch.float32 else 0.2  # of logits of up to 16, rounded to dtype
        torch.testing.assert_close(logprob[same], expected_logprob[same], rtol=0, atol=atol)

    return Case(
        f"lm_head_sample {size} to {vocabulary} {dtype_name(dtype)}", "linear, warper + multinomial", layers,
        ours, theirs, check, bytes_moved=vocabulary * size * dtype.itemsize, flops=2 * ROWS * vocabulary * size,
    )  # fmt: skip


# kv_commit


def commit_case(
    dtype: torch.dtype, prompts: int = 8, depth: int = 30, heads: int = 3, size: int = 64, device: str = "cpu"
) -> Case:
    """A segment of each prompt into the arena, against index_copy_ layer by layer with indices made before."""
    segment, length, width = 15, 200, 3
    g = torch.Generator().manual_seed(SEED)
    capacity = length + segment
    suffix = torch.randn(depth, 2, prompts * width, segment, heads, size, generator=g).to(device, dtype)
    arena = torch.zeros(depth, 2, prompts * capacity, heads, size, dtype=dtype, device=device)
    prompt = torch.arange(prompts, device=device)
    lengths, count = torch.full_like(prompt, length), torch.full_like(prompt, segment)
    offsets, row, advance = prompt * capacity, prompt * width + 1, torch.zeros_like(prompt).bool()
    slots = (offsets[:, None] + length + torch.arange(segment, device=device)).flatten()

    def ours(_: int) -> None:
        ops.kv_commit(suffix, arena, lengths, offsets, prompt, row, count, advance)

    def theirs(_: int) -> None:
        for layer in range(depth):
            arena[layer].index_copy_(1, slots, suffix[layer, :, row].flatten(1, 2))

    def check(_: int) -> None:
        theirs(0)
        expected = arena.clone()
        arena.zero_()
        ours(0)
        if not torch.equal(arena, expected):
            raise CheckError("kv_commit and index_copy_ wrote different arenas")

    moved = 2 * depth * 2 * prompts * segment * heads * size * dtype.itemsize
    return Case(
        f"kv_commit {depth} layers, {prompts} prompts {dtype_name(dtype)}", "index_copy_ by layer", 1,
        ours, theirs, check, bytes_moved=moved, target=3.0,
    )  # fmt: skip


# reward_head


def head_case(dtype: torch.dtype, steps: int = 15, size: int = 576, device: str = "cpu") -> Case:
    """The reward at each row's last token, against transformers' head on every token and a pick."""
    g = torch.Generator().manual_seed(SEED)
    layers = layers_for(ROWS * steps * size * dtype.itemsize, device)
    hidden = torch.randn(layers, ROWS, steps, size, generator=g).to(device, dtype)
    weight = (torch.randn(1, size, generator=g) / size**0.5).to(device, dtype)
    rows = torch.arange(ROWS, device=device)
    last = torch.full_like(rows, steps - 1)

    def ours(layer: int) -> Tensor:
        return ops.reward_head(hidden[layer], last, weight[0])

    def theirs(layer: int) -> Tensor:
        return F.linear(hidden[layer], weight)[rows, last, 0]

    def check(layer: int) -> None:
        truth = hidden[layer, :, -1].double() @ weight[0].double()
        assert_no_worse(ours(layer).to(dtype), theirs(layer), truth)

    return Case(
        f"reward_head {steps} tokens of {size} {dtype_name(dtype)}", "head on every token", layers,
        ours, theirs, check, bytes_moved=ROWS * size * dtype.itemsize,
    )  # fmt: skip


# accept


def decision_case(prompts: int, width: int = 8, device: str = "cpu") -> Case:
    """A round's decisions, against the definition: torch, a column at a time."""
    g = torch.Generator().manual_seed(SEED)
    rewards = torch.randn(prompts, width, generator=g).to(device)
    thresholds = torch.full((prompts, width), 1.0, dtype=torch.float64, device=device)
    keys = torch.randint(2**62, (prompts,), generator=g).to(device)
    zeros = torch.zeros_like(keys)

    def ours(layer: int) -> tuple[Tensor, ...]:
        best, attempt = torch.full_like(thresholds[:, 0], -torch.inf), zeros - 1
        chosen = ops.accept(
            rewards,
            rewards == rewards,
            thresholds,
            keys,
            zeros + layer,
            zeros,
            best,
            attempt,
            max_attempts=20,
            beta=0.5,
        )
        return *chosen, best, attempt

    def theirs(layer: int) -> tuple[Tensor, ...]:
        with stars_kernels.reference():
            return ours(layer)

    def check(layer: int) -> None:
        for found, expected in zip(ours(layer), theirs(layer), strict=True):
            if not torch.equal(found, expected):
                raise CheckError(f"decided {found.tolist()}, by the definition {expected.tolist()}")

    moved = prompts * (width * (4 + 1 + 8) + 7 * 8)
    return Case(f"accept {prompts} prompts x {width}", "definition", 4, ours, theirs, check, bytes_moved=moved)


# packed_linear


def linear_case(rows: int, columns: int, depth: int, dtype: torch.dtype) -> Case:
    """A linear layer of a decoding step in fp32, its weights packed in `dtype`, against torch's own."""
    g = torch.Generator().manual_seed(SEED)
    layers = layers_for(columns * depth * 4, "cpu")
    weights = torch.randn(layers, columns, depth, generator=g)
    packed = [ops.pack_linear(weight, dtype) for weight in weights]
    x = torch.randn(rows, depth, generator=g)

    def ours(layer: int) -> Tensor:
        return ops.packed_linear(x, packed[layer], columns)

    def theirs(layer: int) -> Tensor:
        return F.linear(x, weights[layer])

    def check(layer: int) -> None:
        rounded = weights[layer].to(dtype)
        truth = F.linear(x.double(), rounded.double())
        error = (ours(layer).double() - truth).abs()
        terms = F.linear(x.double().abs(), rounded.double().abs())
        if not (error <= torch.finfo(torch.float32).eps * depth**0.5 * terms).all():
            raise CheckError(f"error {error.max():.3g}")

    return Case(
        f"packed_linear {rows} rows, {depth} to {columns}, {dtype_name(dtype)} weights", "linear, fp32", layers,
        ours, theirs, check, bytes_moved=columns * depth * dtype.itemsize, flops=2 * rows * columns * depth,
    )  # fmt: skip


# content_hash


def hash_case(rows: int = 49_152, size: int = 576) -> Case:
    """The check whether a weight has changed, against the plain sum of its words, which moves do not change."""
    g = torch.Generator().manual_seed(SEED)
    layers = layers_for(rows * size * 4, "cpu")
    weights = torch.randn(layers, rows, size, generator=g)

    def ours(layer: int) -> int:
        return ops.content_hash(weights[layer])

    def theirs(layer: int) -> int:
        return int(weights[layer].view(torch.int64).sum())

    def check(layer: int) -> None:
        found, expected = ours(layer), int(content_hash_ref(weights[layer]))
        if found != expected:
            raise CheckError(f"content_hash is {found}, its definition {expected}")

    return Case(
        f"content_hash {rows} x {size} fp32", "sum of words", layers, ours, theirs, check,
        bytes_moved=rows * size * 4,
    )  # fmt: skip


def cases(prefixes: tuple[int, ...] = (128, 1024, 4096)) -> Iterator[Case]:
    """One at a time: a case's data is gone before the next is made."""
    dtypes = (torch.float32, torch.bfloat16)
    for shape, prefix, dtype in itertools.product(((9, 3, 64), (32, 8, 128)), prefixes, dtypes):
        yield attention_case(*shape, prefix, 1, dtype)
    yield attention_case(9, 3, 64, 1024, 15, torch.float32)
    for vocabulary, filters in itertools.product((49_152, 128_256), FILTERS):
        yield sampling_case(vocabulary, filters, torch.float32)
    yield sampling_case(128_256, "temperature, top-k, top-p", torch.bfloat16)
    for dtype in dtypes:
        yield commit_case(dtype)
    for dtype in dtypes:
        yield head_case(dtype)
    for prompts in (8, 64):
        yield decision_case(prompts)
    for rows, (columns, depth) in itertools.product((8, 24), ((576, 576), (1536, 576), (49_152, 576))):
        yield linear_case(rows, columns, depth, torch.float32)
    yield linear_case(8, 1536, 576, torch.bfloat16)
    yield hash_case()


def gpu_cases(prefixes: tuple[int, ...] = (128, 1024, 4096), device: str = "cuda") -> Iterator[Case]:
    """Every case in both dtypes, packed_linear aside: the packed weights are the CPU's."""
    dtypes = (torch.float32, torch.bfloat16)
    for shape, prefix, dtype in itertools.product(((9, 3, 64), (32, 8, 128)), prefixes, dtypes):
        yield attention_case(*shape, prefix, 1, dtype, device)
    for dtype in dtypes:
        yield attention_case(9, 3, 64, 1024, 15, dtype, device)
    for vocabulary, filters, dtype in itertools.product((49_152, 128_256), FILTERS, dtypes):
        yield sampling_case(vocabulary, filters, dtype, device)
    for (vocabulary, size), dtype in itertools.product(((49_152, 576), (151_936, 896)), dtypes):
        yield output_case(vocabulary, size, dtype, device)
    for dtype in dtypes:
        yield commit_case(dtype, device=device)
    for dtype in dtypes:
        yield head_case(dtype, device=device)
    for prompts in (8, 64):
        yield decision_case(prompts, device=device)


def seconds_of(work: Callable[[int], Any], layer: int, layers: int, device: str) -> float:
    """Seconds of a call on `layer`; on a GPU the mean of CUDA_CALLS calls, on that layer and the next ones."""
    if device == "cpu":
        began = time.perf_counter()
        work(layer)
        return time.perf_counter() - began
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for call in range(CUDA_CALLS):
        work((layer + call) % layers)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / CUDA_CALLS


def measure(case: Case, rates: Rates, seconds: float, device: str = "cpu") -> Row:
    """Alternate calls of both for about `seconds`; the medians."""
    layer = itertools.cycle(range(case.layers))
    times: tuple[list[float], list[float]] = ([], [])
    for work in (case.ours, case.theirs):  # warm up
        work(next(layer))
    wait(device)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        n = next(layer)
        for work, found in zip((case.ours, case.theirs), times, strict=True):
            found.append(seconds_of(work, n, case.layers, device))
    ours, theirs = map(statistics.median, times)
    floor = max(case.bytes_moved / rates.read_bytes_per_second, case.flops / rates.gemm_flops_per_second)
    target = case.target if device == "cpu" else None
    return Row(case.name, case.against, theirs / ours, target, ours / floor, ours, theirs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with TEXT in their name")


def run(args: argparse.Namespace) -> list[Row]:
    rows = []
    prefixes = (128, 1024) if args.quick else (128, 1024, 4096)
    if args.device == "cuda":
        check_triton()
        print("left out: packed_linear, a kernel of the CPU alone", flush=True)
    for case in gpu_cases(prefixes) if args.device == "cuda" else cases(prefixes):
        if args.only not in case.name:
            continue
        try:
            case.check(0)
        except CheckError as error:
            raise CheckError(f"{case.name}: {error}") from error
        rows.append(measure(case, args.rates, 0.5 if args.quick else 3.0, args.device))
        print(f"  {case.name}: {rows[-1].ratio:.2f}x", flush=True)
    if not rows:
        raise CheckError(f"no case has {args.only!r} in its name")
    return rows
