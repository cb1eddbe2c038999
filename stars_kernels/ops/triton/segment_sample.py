"""segment_sample on a GPU: no sort, no copy of the vocabulary, no word to the host.

Without filters, one read of each row of logits, two launches:

    race       [R, chunks]  the winner of each chunk of the vocabulary, and its part of the softmax sum
    finish     [R]          merges the sums of a row in order, and lets the chunks' winners race

A race shifts scores by the row's maximum, but a chunk knows its own alone. That picks the chunk's winner, as a common
shift changes no order but for rounding in the last bit; the winners then race with keys of the row's maximum.

With filters, one read of each row and a second one of the few places where survivors can be, four launches:

    groups     [N, chunks]  the largest score of each GROUP consecutive tokens (for top-p its sum of exp, too)
    bound      [N]          from these V / GROUP values, a score below which nothing survives
    gather     [N, chunks]  scores and ids of all tokens at or above it: tens to thousands, the candidates
    draw       [R]          the filters on the candidates, exactly, then the survivors' race

All filters are thresholds on the score, and top-p also one on the id of those tied at its threshold. A threshold is
searched by bit patterns: a pass over the candidates sums for PIVOTS of them at once, and leaves the range between two.
Candidates come in the order of an atomic counter, and the order of a block's sum is the compiler's: so whatever is
added is an integer, a count or a probability in units of 2^-40, and a row's bits depend on nothing but the row.

Where the candidates do not fit the buffer, or do not reach top_p (flat rows, thousands of ties), `draw` runs the same
code over the whole row instead: exact too, but some twenty reads of the row by one program.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_kernels.ops.segment_sample import segment_sample_ref
from stars_kernels.ops.triton._launch import on_device_of
from stars_kernels.ops.triton.philox import log, noise, token_bits, token_words

CHUNK = 2048  # tokens a program of race, groups and gather reads: 16 a thread
GROUP = 64  # tokens behind one maximum
CAPACITY = 8192  # candidates a row
TILE = 512  # candidates, or groups, at a time in bound and draw: with 1024, PIVOTS of them fill the registers
PIVOTS = tl.constexpr(8)  # thresholds that a pass over them tries: a search of 32 bits takes 11 passes
STREAM_WARPS, SEARCH_WARPS, FINISH_WARPS = 4, 8, 1
MAX_VOCABULARY = 1 << 22  # a row's mass in units of 2^-40 fits 63 bits

LOWEST = tl.constexpr(-3.4028234663852886e38)  # -inf is never kept
NO_ID = tl.constexpr(0x7FFFFFFF)
UNIT = tl.constexpr(2.0**40)


def segment_sample_triton(
    logits: Tensor,
    keys: Tensor,
    attempt: Tensor,
    position: Tensor,
    source: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """See `ops.segment_sample`; nobody checks `source`. float64 and huge vocabularies run the definition."""
    rows, sources, vocabulary = keys.shape[0], *logits.shape
    if logits.dtype == torch.float64 or vocabulary > MAX_VOCABULARY:
        return segment_sample_ref(logits, keys, attempt, position, source, temperature, top_k, top_p, min_p, stream)
    token = torch.empty_like(keys, memory_format=torch.contiguous_format)
    logprob = logits.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return token, logprob
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    source = None if source is None else source.contiguous()
    inputs = (logits, logits.stride(0), vocabulary, temperature)
    draws = (source, keys.contiguous(), attempt.contiguous(), position.contiguous(), stream)
    has_top_k, has_top_p = 0 < top_k < vocabulary, top_p < 1
    chunks = triton.cdiv(vocabulary, CHUNK)
    streaming = {"CHUNK": CHUNK, "num_warps": STREAM_WARPS, "enable_fp_fusion": False}
    searching = {"TILE": TILE, "num_warps": SEARCH_WARPS, "enable_fp_fusion": False}

    def scratch(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    with on_device_of(logits):
        if not has_top_k and not has_top_p and min_p <= 0:
            chunk_max, chunk_mass = scratch(torch.float32, rows, chunks), scratch(torch.int64, rows, chunks)
            parts = (scratch(torch.int32, rows, chunks), chunk_max, chunk_mass)
            _race[(rows, chunks)](*inputs, *draws, *parts, chunks, **streaming)
            _finish[(rows,)](
                *inputs, *draws, *parts, token, logprob, chunks,
                CHUNKS=triton.next_power_of_2(chunks), num_warps=FINISH_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            return token, logprob

        groups, capacity = triton.cdiv(vocabulary, GROUP), min(CAPACITY, triton.next_power_of_2(vocabulary))
        # Were survivors spread evenly, this many of the groups would hold one of the capacity / 2 best tokens.
        enough = math.ceil(groups * -math.expm1(-capacity / 2 / groups))
        log_min_p = math.log(min_p) if min_p > 0 else -math.inf  # min-p keeps score - best >= log(min_p)
        maximum = scratch(torch.float32, sources, groups)
        mass = scratch(torch.float32, sources, groups) if has_top_p and not has_top_k else None
        best, bound = scratch(torch.float32, 2, sources)
        total, found = scratch(torch.int64, sources), scratch(torch.int32, sources)
        scores, ids = scratch(torch.float32, sources, capacity), scratch(torch.int32, sources, capacity)
        filters = (top_k if has_top_k else 0, top_p, log_min_p, has_top_k, has_top_p)
        _groups[(sources, chunks)](*inputs, maximum, mass, groups, GROUP=GROUP, **streaming)
        _bound[(sources,)](maximum, mass, best, bound, total, found, groups, enough, *filters, **searching)
        _gather[(sources, chunks)](*inputs, maximum, bound, found, scores, ids, groups,
                                   GROUP=GROUP, CAPACITY=capacity, **streaming)  # fmt: skip
        _draw[(rows,)](*inputs, *draws, best, bound, total, found, scores, ids, token, logprob, *filters,
                       CAPACITY=capacity, **searching)  # fmt: skip
    return token, logprob


# --- without filters ---


@triton.jit(do_not_specialize=["stream"], do_not_specialize_on_alignment=["source", "keys", "attempt", "position"])
def _race(
    logits, stride, vocabulary, temperature, source, keys, attempt, position, stream,
    winners, chunk_max, chunk_mass, chunks, CHUNK: tl.constexpr,
):  # fmt: skip
    """Chunk c of draw r. A NaN counts as +inf, so that it shows in the maximum."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits += (row if source is None else tl.load(source + row)) * stride
    blocks = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
    w0, w1, w2, w3 = token_words(blocks, tl.load(keys + row), tl.load(position + row), tl.load(attempt + row), stream)
    bits = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # [CHUNK], by id
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _scores(logits, ids, vocabulary, temperature)
    x = tl.where(x != x, float("inf"), x)
    largest = tl.max(x)
    key = noise(bits) - _below(x, largest)
    out = row * chunks + chunk
    tl.store(winners + out, tl.min(tl.where(key == tl.min(key), ids, NO_ID)))
    tl.store(chunk_max + out, largest)
    tl.store(chunk_mass + out, tl.sum(_mass(x, largest)))


@triton.jit(do_not_specialize=["stream"], do_not_specialize_on_alignment=["source", "keys", "attempt", "position"])
def _finish(
    logits, stride, vocabulary, temperature, source, keys, attempt, position, stream,
    winners, chunk_max, chunk_mass, token, logprob, chunks, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Draw r, from the winners of its chunks; the smallest id among equal keys."""
    row = tl.program_id(0).to(tl.int64)
    logits += (row if source is None else tl.load(source + row)) * stride
    at = row * chunks + tl.arange(0, CHUNKS)
    inside = tl.arange(0, CHUNKS) < chunks
    ids = tl.load(winners + at, mask=inside, other=NO_ID)
    largest = tl.load(chunk_max + at, mask=inside, other=-float("inf"))
    best = tl.max(largest)
    mass = tl.load(chunk_mass + at, mask=inside, other=0).to(tl.float32) * _exp_from(largest, best)
    bits = token_bits(ids, tl.load(keys + row), tl.load(position + row), tl.load(attempt + row), stream)
    key = noise(bits) - _below(_scores(logits, ids, vocabulary, temperature), best)
    winner = tl.min(tl.where(key == tl.min(key), ids, NO_ID))
    _store(logits, temperature, winner, best, tl.sum(mass.to(tl.int64)), token + row, logprob + row)


# --- with filters ---


@triton.jit
def _groups(
    logits, stride, vocabulary, temperature, maximum, mass, groups, CHUNK: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Of each group the largest score, a NaN being +inf, and its mass relative to that."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = _scores(logits + row * stride, ids, vocabulary, temperature)
    x = tl.where(x != x, float("inf"), x)
    largest = tl.max(x, axis=1)
    tl.store(maximum + row * groups + group, largest, mask=group < groups)
    if mass is not None:
        total = tl.sum(_mass(x, largest[:, None]), axis=1)
        tl.store(mass + row * groups + group, total.to(tl.float32), mask=group < groups)


@triton.jit(do_not_specialize=["enough", "top_k"], do_not_specialize_on_alignment=["best", "bound"])
def _bound(
    maximum, mass, best, bound, total, found, groups, enough, top_k, top_p, log_min_p,
    HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of each row the largest score, the total mass, and a bound for the gather.

    top-k: the k-th largest of the group maxima, as so many tokens reach it. top-p: where the maxima alone reach top_p,
    or if that lies lower, where `enough` groups do: then `_draw` has to see whether the tokens gathered reach top_p.
    """
    row = tl.program_id(0).to(tl.int64)
    maximum += row * groups
    largest = tl.full([TILE], -float("inf"), tl.float32)
    for begin in range(0, groups, TILE):
        largest = tl.maximum(largest, _scores(maximum, begin + tl.arange(0, TILE), groups, None))
    top = tl.max(largest)
    low = tl.full([], LOWEST, tl.float32)
    if HAS_TOP_K or HAS_TOP_P:
        low = _threshold(maximum, groups, None, low, top, top_k if HAS_TOP_K else enough, False, TILE)
    if mass is not None:
        sums = tl.zeros([TILE], tl.int64)
        for begin in range(0, groups, TILE):
            at = begin + tl.arange(0, TILE)
            part = tl.load(mass + row * groups + at, mask=at < groups, other=0.0)
            sums += (part * _exp_from(_scores(maximum, at, groups, None), top)).to(tl.int64)
        tl.store(total + row, tl.sum(sums))
        low = _threshold(maximum, groups, None, low, top, _share(tl.sum(sums), top_p), True, TILE)
    if not HAS_TOP_P:  # top-p weighs what min-p drops, too
        low = tl.maximum(low, top + log_min_p - 1e-6 * (tl.abs(top) - log_min_p))  # rounding must not lose one
    tl.store(best + row, top)
    tl.store(bound + row, tl.where(tl.abs(top) < float("inf"), low, float("nan")))  # a broken row gathers nothing
    tl.store(found + row, 0)


@triton.jit(do_not_specialize_on_alignment=["bound"])
def _gather(
    logits, stride, vocabulary, temperature, maximum, bound, found, scores, ids, groups,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Appends the chunk's candidates to those of its row; `found` counts those that do not fit, too."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    low = tl.load(bound + row)
    group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
    hot = tl.load(maximum + row * groups + group, mask=group < groups, other=-float("inf")) >= low
    if tl.max(hot.to(tl.int32)) > 0:
        at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        there = hot[:, None] & (at < vocabulary)  # other groups are not read
        x = tl.load(logits + row * stride + at, mask=there, other=-float("inf")).to(tl.float32)
        x = tl.reshape(tl.div_rn(x, temperature), [CHUNK])
        stays = (x >= low).to(tl.int32)
        slot = tl.atomic_add(found + row, tl.sum(stays), sem="relaxed") + tl.cumsum(stays) - 1
        fits = (stays > 0) & (slot < CAPACITY)
        tl.store(scores + row * CAPACITY + slot, x, mask=fits)
        tl.store(ids + row * CAPACITY + slot, tl.reshape(at, [CHUNK]), mask=fits)


@triton.jit(
    do_not_specialize=["stream", "top_k"],
    do_not_specialize_on_alignment=["source", "keys", "attempt", "position", "best", "bound"],
)
def _draw(
    logits, stride, vocabulary, temperature, source, keys, attempt, position, stream,
    best, bound, total, found, scores, ids, token, logprob, top_k, top_p, log_min_p,
    HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, CAPACITY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One draw, from its row's candidates, or from the whole row where they cannot be known to hold all survivors."""
    draw = tl.program_id(0).to(tl.int64)
    row = draw if source is None else tl.load(source + draw)
    logits += row * stride
    scores += row * CAPACITY
    ids += row * CAPACITY
    key, place, number = tl.load(keys + draw), tl.load(position + draw), tl.load(attempt + draw)
    top, low, count = tl.load(best + row), tl.load(bound + row), tl.load(found + row)
    complete = count <= CAPACITY  # the survivors are among the candidates
    wanted = tl.full([], 0, tl.int64)
    if HAS_TOP_P and not HAS_TOP_K:
        wanted = _share(tl.load(total + row), top_p)
        reached = _weight(scores, tl.minimum(count, CAPACITY), None, low, top, TILE) >= wanted
        complete = complete & (reached | (low <= LOWEST))
    if tl.abs(top) == float("inf"):
        winner, mass = tl.full([], NO_ID, tl.int32), tl.full([], 0, tl.int64)
    elif complete:
        winner, mass = _filtered_race(
            scores, ids, count, None, low, top, wanted, top_k, top_p, log_min_p, vocabulary,
            key, place, number, stream, HAS_TOP_K, HAS_TOP_P, TILE,
        )  # fmt: skip
    else:
        winner, mass = _filtered_race(
            logits, None, vocabulary, temperature, tl.full([], LOWEST, tl.float32), top, wanted, top_k, top_p,
            log_min_p, vocabulary, key, place, number, stream, HAS_TOP_K, HAS_TOP_P, TILE,
        )  # fmt: skip
    _store(logits, temperature, winner, top, mass, token + draw, logprob + draw)


@triton.jit
def _filtered_race(
    scores, ids, count, temperature, low, best, wanted, top_k, top_p, log_min_p, vocabulary,
    key, position, attempt, stream, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The winner's id, and the survivors' mass, of `count` scores; ids None: token i is at i.

    No survivor's score is below `low`; `wanted` is the mass that top-p alone asks for.
    """
    last = vocabulary.to(tl.int64)  # of the tokens whose score is `low`, those up to this id survive
    if HAS_TOP_K:
        low = _threshold(scores, count, temperature, low, best, top_k, False, TILE)
    if HAS_TOP_P:
        if HAS_TOP_K:
            wanted = _share(_weight(scores, count, temperature, low, best, TILE), top_p)
        low = _threshold(scores, count, temperature, low, best, wanted, True, TILE)
        each = _mass(low, best)
        above, ties = _above(scores, count, temperature, low, best, TILE)
        if above + (ties - 1) * each >= wanted:
            needed = (wanted - above + each - 1) // each
            last = _last_tie(scores, ids, count, temperature, low, needed, last, TILE)
    best_key = tl.full([], float("inf"), tl.float32)
    winner = tl.full([], NO_ID, tl.int32)
    mass = tl.zeros([TILE], tl.int64)
    for begin in range(0, count, TILE):
        at = begin + tl.arange(0, TILE)
        x = _scores(scores, at, count, temperature)
        token = at if ids is None else tl.load(ids + at, mask=at < count, other=NO_ID)
        stays = ((x > low) | ((x == low) & (token <= last))) & (x - best >= log_min_p)
        mass += tl.where(stays, _mass(x, best), 0)
        keys = tl.where(stays, noise(token_bits(token, key, position, attempt, stream)) - (x - best), float("inf"))
        tile_key = tl.min(keys)
        tile_winner = tl.min(tl.where(keys == tile_key, token, NO_ID))
        better = (tile_key < best_key) | ((tile_key == best_key) & (tile_winner < winner))
        best_key = tl.where(better, tile_key, best_key)
        winner = tl.where(better, tile_winner, winner)
    return winner, tl.sum(mass)


# --- sums over scores, and searches ---


@triton.jit
def _threshold(scores, count, temperature, low, best, wanted, MASS: tl.constexpr, TILE: tl.constexpr):
    """The largest t in [low, best] such that scores >= t have `wanted` weight; `low` where all have less.

    MASS: a score weighs its mass, else 1. Of a count, any t that is reached by as many scores: they are the same ones.
    """
    first, last = _pattern(low).to(tl.int64), _pattern(best).to(tl.int64)
    while first < last:
        pivots = _pivots(first, last)
        least = _of_pattern(pivots.to(tl.uint32))[:, None]
        weights = tl.zeros([PIVOTS], tl.int64)
        for begin in range(0, count, TILE):
            x = _scores(scores, begin + tl.arange(0, TILE), count, temperature)
            if MASS:
                weights += tl.sum(tl.where(x[None, :] >= least, _mass(x, best)[None, :], 0), axis=1)
            else:
                weights += tl.sum((x[None, :] >= least).to(tl.int32), axis=1)
        first, last = _narrowed(first, last, pivots, weights, wanted, not MASS)
    return _of_pattern(first.to(tl.uint32))


@triton.jit
def _last_tie(scores, ids, count, temperature, score, wanted, vocabulary, TILE: tl.constexpr):
    """An id up to which `wanted` tokens have this score. Ids count down from the vocabulary's end here."""
    first, last = vocabulary * 0, vocabulary
    while first < last:
        pivots = _pivots(first, last)
        most = (vocabulary - pivots).to(tl.int32)[:, None]
        weights = tl.zeros([PIVOTS], tl.int64)
        for begin in range(0, count, TILE):
            at = begin + tl.arange(0, TILE)
            token = at if ids is None else tl.load(ids + at, mask=at < count, other=NO_ID)
            ties = _scores(scores, at, count, temperature) == score
            weights += tl.sum((ties[None, :] & (token[None, :] <= most)).to(tl.int32), axis=1)
        first, last = _narrowed(first, last, pivots, weights, wanted, True)
    return vocabulary - first


@triton.jit
def _pivots(first, last):
    """Numbers above `first`, up to `last`: between two of them lies at most a part of PIVOTS + 1 of the range."""
    step = (last - first) // (PIVOTS + 1) + 1
    return tl.minimum(first + step * (1 + tl.arange(0, PIVOTS)), last)


@triton.jit
def _narrowed(first, last, pivots, weights, wanted, COUNT: tl.constexpr):
    """The range left for the largest pivot that has `wanted` weight, given those of all pivots, which fall.

    COUNT: a pivot that is met exactly ends the search.
    """
    narrow = tl.max(tl.where(weights >= wanted, pivots, first))
    last = tl.min(tl.where(weights >= wanted, last, pivots - 1))
    if COUNT:
        last = tl.where(tl.max((weights == wanted).to(tl.int32)) > 0, narrow, last)
    return narrow, last


@triton.jit
def _weight(scores, count, temperature, low, best, TILE: tl.constexpr):
    """The mass of the scores that are at least `low`."""
    weight = tl.zeros([TILE], tl.int64)
    for begin in range(0, count, TILE):
        x = _scores(scores, begin + tl.arange(0, TILE), count, temperature)
        weight += tl.where(x >= low, _mass(x, best), 0)
    return tl.sum(weight)


@triton.jit
def _above(scores, count, temperature, low, best, TILE: tl.constexpr):
    """The mass of the scores above `low`, and how many are equal to it."""
    weight = tl.zeros([TILE], tl.int64)
    ties = tl.zeros([TILE], tl.int64)
    for begin in range(0, count, TILE):
        x = _scores(scores, begin + tl.arange(0, TILE), count, temperature)
        weight += tl.where(x > low, _mass(x, best), 0)
        ties += (x == low).to(tl.int64)
    return tl.sum(weight), tl.sum(ties)


@triton.jit
def _pattern(x):
    """fp32 to uint32, in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def _of_pattern(pattern):
    bits = pattern.to(tl.int32, bitcast=True)
    return (bits ^ ((~bits >> 31) | -0x80000000)).to(tl.float32, bitcast=True)


# --- arithmetic ---


@triton.jit
def _scores(logits, at, count, temperature):
    """Logits over temperature, None where they are scores already; -inf from `count` on."""
    x = tl.load(logits + at, mask=at < count, other=-float("inf")).to(tl.float32)
    return x if temperature is None else tl.div_rn(x, temperature)


@triton.jit
def _below(x, best):
    """x - best for x <= best, both of which may be infinite."""
    return tl.where(x == best, 0.0, x - best)


@triton.jit
def _exp_from(x, best):
    return tl.exp(_below(x, best))


@triton.jit
def _mass(x, best):
    """exp(x - best), an integer in units of 2^-40: sums do not depend on their order."""
    return (_exp_from(x, best) * UNIT).to(tl.int64)


@triton.jit
def _share(total, top_p):
    """The least integer that is not below top_p * total; at least one: top_p may be 0 in fp32, and one token stays."""
    exact = total.to(tl.float64) * top_p
    share = exact.to(tl.int64)
    return tl.maximum(share + (share.to(tl.float64) < exact).to(tl.int64), 1)


@triton.jit
def _store(logits, temperature, winner, best, mass, token, logprob):
    """The draw's result: -1 and NaN for a row of NaN, +inf or nothing finite, whose maximum tells."""
    good = tl.abs(best) < float("inf")
    score = tl.div_rn(tl.load(logits + winner, mask=good, other=0.0).to(tl.float32), temperature)
    tl.store(token, tl.where(good, winner, -1).to(tl.int64))
    tl.store(logprob, tl.where(good, score - best - log(mass.to(tl.float32) / UNIT), float("nan")))
