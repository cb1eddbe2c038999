"""fork_attention on a GPU: one program reads a prompt's prefix for BLOCK_M queries, as one matrix product a tile.

A prompt's queries are rows x steps x heads of the group, stacked without gaps and cut in blocks of BLOCK_M; a program
is (block, key/value head, split). Its queries go over the split's share of the prefix together; the last split also
goes over the suffixes of the block's rows, laid end to end, where a query sees its own row's alone. With one split the
output is written; with several, each leaves (sum, maximum, accumulator) and a second kernel merges them by log-sum-exp.
Nothing on the host depends on a length.

A kernel is compiled again for each constant and, where Triton specialises an argument, for each kind of value. What
changes from round to round (rows up to 2,048, steps, splits) is therefore neither, but for the block of queries and
whether there are splits: tests/test_gpu_variants.py counts.

So the prefix is read once per prompt where its queries fit one block, as those of a decoding step do: 128 in half
precision up to head size 128, which is 32 rows of a group of 4. Scoring whole segments takes more, and then reads it
ceil(queries / BLOCK_M) times: 2 for 4 rows x 15 tokens x a group of 4. `python -m bench roofline` counts these reads.

A value that is infinite or NaN must stay with the queries that see it, but 0 * inf is NaN, and a block's rows share
tiles. A block whose result is not finite is therefore computed again, with such values taken out of the products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_kernels.ops.fork_attention import fork_attention_ref
from stars_kernels.ops.triton._launch import on_device_of

MAX_SPLITS = 16
TARGET_PROGRAMS = 264  # two for each multiprocessor of an H100
SPLIT_KEYS = 256  # an average share of a prompt's arena slots below which a split does not pay

PART_M = tl.constexpr(16)  # queries that share a tile where values are not finite
USUAL_ROWS = 2048  # up to which a kernel serves any number of rows
MERGE_WARPS = 1


def settings(dtype: torch.dtype, size: int) -> dict[str, int]:
    """Launch settings for heads of `size` (the larger of Dk and Dv): most queries and keys of a tile, and the rest."""
    if dtype == torch.float32:  # no tensor cores: IEEE products from registers
        return {"max_m": 16, "block_n": 32 if size <= 64 else 16, "num_warps": 8, "num_stages": 1}
    return {"max_m": 128 if size <= 128 else 32, "block_n": 32, "num_warps": 8, "num_stages": 2}


def fork_attention_triton(
    query: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    suffix_len: Tensor,
    query_len: Tensor,
    arena_key: Tensor,
    arena_value: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    prompt: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """See `ops.fork_attention`; scores and sums in fp32. float64 runs the definition (which waits for the host)."""
    if query.dtype == torch.float64:
        return fork_attention_ref(
            query, suffix_key, suffix_value, suffix_len, query_len, arena_key, arena_value, offsets, lengths, prompt,
            scale, window, softcap, sinks,
        )  # fmt: skip
    rows, steps, heads, key_size = query.shape
    kv_heads, value_size, prompts = suffix_key.shape[2], suffix_value.shape[3], offsets.shape[0]
    out = query.new_empty(rows, steps, heads, value_size)
    if out.numel() == 0:
        return out
    query, suffix_key, suffix_value, arena_key, arena_value = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (query, suffix_key, suffix_value, arena_key, arena_value)
    )
    suffix_len, query_len, offsets, lengths, prompt = (
        t.contiguous() for t in (suffix_len, query_len, offsets, lengths, prompt)
    )
    sinks = None if sinks is None else sinks.contiguous()

    use = settings(query.dtype, max(key_size, value_size))
    group = heads // kv_heads
    per_row = steps * group  # queries of a row that share a key/value head
    per_prompt = triton.cdiv(rows, max(prompts, 1)) * per_row  # on average
    block_m = min(use["max_m"], max(16, triton.next_power_of_2(per_prompt)))
    row_blocks = triton.cdiv(per_row, block_m)  # programs for each row: enough for any number of rows side by side
    busy = min(prompts, rows) * triton.cdiv(per_prompt, block_m) * kv_heads
    splits = min(MAX_SPLITS, TARGET_PROGRAMS // busy, arena_key.shape[0] // max(prompts, 1) // SPLIT_KEYS)
    splits = max(1, splits)
    size = rows * steps * heads
    partial = stats = out  # not used by a single split
    if splits > 1:
        partial = out.new_empty(splits, *out.shape, dtype=torch.float32)
        stats = out.new_empty(2, splits, size, dtype=torch.float32)  # maximum, sum
    with on_device_of(query):
        _fork_attention[(rows * row_blocks, kv_heads, splits)](
            query, suffix_key, suffix_value, suffix_len, query_len, arena_key, arena_value, offsets, lengths, prompt,
            sinks, out, partial, stats, rows, steps, size, row_blocks, scale, window, softcap,
            *query.stride()[:3], *suffix_key.stride()[:3], *suffix_value.stride()[:3],
            *arena_key.stride()[:2], *arena_value.stride()[:2],
            GROUP=group, DK=key_size, DV=value_size, SPLIT=splits > 1, WINDOW=window > 0, SOFTCAP=softcap > 0,
            ROWS=max(USUAL_ROWS, triton.next_power_of_2(rows)), BLOCK_M=block_m, BLOCK_N=use["block_n"],
            BLOCK_DK=max(16, triton.next_power_of_2(key_size)), BLOCK_DV=max(16, triton.next_power_of_2(value_size)),
            num_warps=use["num_warps"], num_stages=use["num_stages"], enable_fp_fusion=True,
        )  # fmt: skip
        if splits > 1:
            _merge[(size,)](
                partial, stats, sinks, out, size, heads, splits,
                DV=value_size, BLOCK_S=triton.next_power_of_2(MAX_SPLITS),
                BLOCK_DV=triton.next_power_of_2(value_size), num_warps=MERGE_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return out


@triton.jit(
    do_not_specialize=["rows", "steps", "size", "row_blocks", "window"],
    do_not_specialize_on_alignment=["suffix_len", "query_len", "offsets", "lengths", "prompt"],
)
def _fork_attention(
    query, suffix_key, suffix_value, suffix_len, query_len, arena_key, arena_value, offsets, lengths, prompt,
    sinks, out, partial, stats, rows, steps, size, row_blocks, scale, window, softcap,
    query_row, query_step, query_head, key_row, key_slot, key_head, value_row, value_slot, value_head,
    prefix_key_slot, prefix_key_head, prefix_value_slot, prefix_value_head,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) // row_blocks
    kv_head, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    heads = tl.num_programs(1) * GROUP

    # The rows of a prompt that lie side by side share their programs: the first ones take a block of queries each.
    owner = tl.load(prompt + place)
    other = tl.arange(0, ROWS)
    foreign = tl.load(prompt + other, mask=other < rows, other=-1) != owner
    run_begin = tl.max(tl.where(foreign & (other < place), other + 1, 0))
    run_end = tl.min(tl.where(foreign & (other > place), other, rows))
    per_row = steps * GROUP
    queries = (run_end - run_begin) * per_row
    first = ((place - run_begin) * row_blocks + tl.program_id(0) % row_blocks) * BLOCK_M
    if first >= queries:
        return

    slots = tl.load(offsets + owner).to(tl.int64)
    arena_key += slots * prefix_key_slot + kv_head * prefix_key_head
    arena_value += slots * prefix_value_slot + kv_head * prefix_value_head
    query += kv_head * GROUP * query_head
    prefix = tl.load(lengths + owner).to(tl.int32)
    apart = _block(
        query, suffix_key, suffix_value, suffix_len, query_len, arena_key, arena_value, sinks, out, partial, stats,
        run_begin, first, queries, prefix, split, kv_head, heads, steps, size, scale, window, softcap,
        query_row, query_step, query_head, key_row, key_slot, key_head, value_row, value_slot, value_head,
        prefix_key_slot, prefix_value_slot,
        GROUP, DK, DV, SPLIT, WINDOW, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_DK, BLOCK_DV, False,
    )  # fmt: skip
    # What every part needs is computed in each: held across the first pass, it would cost that registers.
    for part in tl.range(0, apart * tl.minimum(BLOCK_M, queries - first), PART_M, disable_licm=True):
        _block(
            query, suffix_key, suffix_value, suffix_len, query_len, arena_key, arena_value, sinks, out, partial, stats,
            run_begin, first + part, queries, prefix, split, kv_head, heads, steps, size, scale, window, softcap,
            query_row, query_step, query_head, key_row, key_slot, key_head, value_row, value_slot, value_head,
            prefix_key_slot, prefix_value_slot,
            GROUP, DK, DV, SPLIT, WINDOW, SOFTCAP, PART_M, BLOCK_N, BLOCK_DK, BLOCK_DV, True,
        )  # fmt: skip


@triton.jit
def _block(
    query, suffix_key, suffix_value, suffix_len, query_len, arena_key, arena_value, sinks, out, partial, stats,
    run_begin, first, queries, prefix, split, kv_head, heads, steps, size, scale, window, softcap,
    query_row, query_step, query_head, key_row, key_slot, key_head, value_row, value_slot, value_head,
    prefix_key_slot, prefix_value_slot,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Queries `first` to first + BLOCK_M of a run. Not APART: whether the result is not finite, and not written."""
    per_row = steps * GROUP
    m = first + tl.arange(0, BLOCK_M)  # [M] queries: (row, step, head of the group)
    row = run_begin + m // per_row
    step = m // GROUP % steps
    asked = tl.load(query_len + row, mask=m < queries, other=0)
    asks = step < asked
    at = (tl.load(suffix_len + row, mask=asks, other=0) - asked).to(tl.int32) + step  # place in the suffix
    dk, dv = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    q = tl.load(
        query + (row.to(tl.int64) * query_row + step.to(tl.int64) * query_step + m % GROUP * query_head)[:, None] + dk,
        mask=asks[:, None] & (dk < DK), other=0.0,
    )  # fmt: skip

    high = tl.where(asks, float("-inf"), 0.0)  # the largest score so far
    total = tl.where(asks, 0.0, 1.0)  # padding becomes 0 / 1
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    seen = 0  # keys that lie too far back for every query
    if WINDOW:
        seen = tl.maximum(prefix + tl.min(tl.where(asks, at, 1 << 30)) - window + 1, 0)
        seen = tl.minimum(seen, prefix) // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(prefix - seen, BLOCK_N), tl.num_programs(2)) * BLOCK_N
    begin = seen + split * share
    end = tl.minimum(begin + share, prefix)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = n < end
        keys = arena_key + n.to(tl.int64) * prefix_key_slot
        values = arena_value + n.to(tl.int64) * prefix_value_slot
        k = tl.load(keys[None, :] + dk[:, None], mask=there[None, :] & (dk < DK)[:, None], other=0.0)
        v = tl.load(values[:, None] + dv, mask=there[:, None] & (dv < DV), other=0.0)
        visible = asks[:, None] & there[None, :]
        if WINDOW:
            visible &= (prefix + at)[:, None] - n[None, :] < window
        high, total, acc = _attend(q, k, v, visible, high, total, acc, scale, softcap, SOFTCAP, APART)

    if split == tl.num_programs(2) - 1:
        used = tl.max(tl.where(asks, at + 1, 0))  # suffix slots that any query sees
        first_row = run_begin + first // per_row
        last_row = run_begin + (tl.minimum(first + BLOCK_M, queries) - 1) // per_row
        suffix_key += kv_head * key_head
        suffix_value += kv_head * value_head
        for start in range(0, (last_row - first_row + 1) * used, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            n_row, slot = first_row + n // used, (n % used).to(tl.int64)
            there = n_row <= last_row
            there &= slot < tl.load(suffix_len + n_row, mask=there, other=0)
            keys = suffix_key + n_row.to(tl.int64) * key_row + slot * key_slot
            values = suffix_value + n_row.to(tl.int64) * value_row + slot * value_slot
            k = tl.load(keys[None, :] + dk[:, None], mask=there[None, :] & (dk < DK)[:, None], other=0.0)
            v = tl.load(values[:, None] + dv, mask=there[:, None] & (dv < DV), other=0.0)
            back = at[:, None] - (n % used)[None, :]
            visible = asks[:, None] & there[None, :] & (row[:, None] == n_row[None, :]) & (back >= 0)
            if WINDOW:
                visible &= back < window
            high, total, acc = _attend(q, k, v, visible, high, total, acc, scale, softcap, SOFTCAP, APART)

    apart = 0
    if not APART:
        apart = 1 - tl.min((tl.abs(acc) < float("inf")).to(tl.int32))
    written = m < tl.where(apart > 0, 0, queries)
    begin_out = (run_begin.to(tl.int64) * steps + first // GROUP) * heads + kv_head * GROUP
    at_out = (m // GROUP - first // GROUP) * heads + m % GROUP
    if not SPLIT:
        result = _normalised(high, total, acc, sinks, kv_head * GROUP + m % GROUP)
        out += begin_out * DV
        tl.store(out + (at_out[:, None] * DV + dv), result.to(out.dtype.element_ty), written[:, None] & (dv < DV))
    else:
        begin_out += split.to(tl.int64) * size
        partial += begin_out * DV
        stats += begin_out
        tl.store(partial + (at_out[:, None] * DV + dv), acc, mask=written[:, None] & (dv < DV))
        tl.store(stats + at_out, high, mask=written)
        tl.store(stats + tl.num_programs(2).to(tl.int64) * size + at_out, total, mask=written)
    return apart


@triton.jit
def _attend(q, k, v, visible, high, total, acc, scale, softcap, SOFTCAP: tl.constexpr, APART: tl.constexpr):
    """One tile of keys into the running softmax: q [M, Dk], k [Dk, N], v [N, Dv], visible [M, N].

    APART: values that are not finite are no part of the product, and reach those who see them alone.
    """
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if SOFTCAP:
        scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))  # softcap * tanh(scores / softcap)
    scores = tl.where(visible, scores, float("-inf"))
    new_high = tl.maximum(high, tl.max(scores, axis=1))
    reference = tl.where(new_high == float("-inf"), 0.0, new_high)  # nothing seen yet: -inf - -inf is NaN
    weights = tl.exp(scores - reference[:, None])
    keep = tl.exp(high - reference)
    acc *= keep[:, None]
    if APART:
        sees = visible.to(v.dtype)
        up = tl.dot(sees, ((v == float("inf")) | (v != v)).to(v.dtype), input_precision="ieee")
        acc += tl.where(up > 0, float("inf"), 0.0)
        down = tl.dot(sees, ((v == float("-inf")) | (v != v)).to(v.dtype), input_precision="ieee")
        acc -= tl.where(down > 0, float("inf"), 0.0)  # both: NaN
        v = tl.where(tl.abs(v) < float("inf"), v, 0.0)
    acc = tl.dot(weights.to(v.dtype), v, acc=acc, input_precision="ieee")
    return new_high, total * keep + tl.sum(weights, axis=1), acc


@triton.jit
def _normalised(high, total, acc, sinks, head):
    """acc [M, Dv] over the softmax's sum; a sink takes part in that sum alone."""
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32)
        reference = tl.maximum(high, sink)
        keep = tl.exp(high - reference)
        acc, total = acc * keep[:, None], total * keep + tl.exp(sink - reference)
    return acc / total[:, None]


@triton.jit(do_not_specialize=["size", "splits"])
def _merge(
    partial, stats, sinks, out, size, heads, splits, DV: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """One program an output vector: its splits' accumulators, each relative to its own maximum, become one."""
    at = tl.program_id(0).to(tl.int64)
    split, dv = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_DV)
    there = split < splits
    place = split.to(tl.int64) * size + at
    high = tl.load(stats + place, mask=there, other=float("-inf"))
    highest = tl.max(high)
    keep = tl.exp(high - tl.where(highest == float("-inf"), 0.0, highest))
    sums = tl.load(stats + (splits + split).to(tl.int64) * size + at, mask=there, other=0.0)
    total = tl.sum(keep * sums)
    acc = tl.load(partial + place[:, None] * DV + dv, mask=there[:, None] & (dv < DV), other=0.0)
    acc = tl.sum(acc * keep[:, None], axis=0)
    head = at % heads + tl.zeros([1], tl.int32)
    result = _normalised(
        highest + tl.zeros([1], tl.float32), total + tl.zeros([1], tl.float32), acc[None, :], sinks, head
    )
    tl.store(out + at * DV + dv[None, :], result.to(out.dtype.element_ty), mask=dv[None, :] < DV)
