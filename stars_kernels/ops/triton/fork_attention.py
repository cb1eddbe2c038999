"""fork_attention on a GPU: a program reads a prompt's prefix for a block of queries, as one matrix product a tile.

A block is up to BLOCK_M queries (rows x steps x heads of the group) of rows of one prompt that lie side by side, or a
part of one row's. The keys that it sees come in parts: its prefix in splits of SPLIT_KEYS, then the suffixes of its
rows. Each part is a softmax of its own, and the parts are folded into one in order (`_fold`). Either one program goes
over all parts of a block, or each part is a program's, that leaves its (maximum, sum, accumulator), and `_merge` folds
them: the same operations in the same order. Which of the two is decided on the device, by a prompt's length.

So a query's bits depend on its own prefix, suffix and window alone: not on the rows beside it, nor on the arena. Three
things make that hold, and a change must keep them: splits are cut by the prompt's own length (`_splits`); a row's own
tokens lie at a multiple of 16 in a tile, and what a query does not see adds exact zeros; a tile has one size for each
dtype and head size. Proved in Triton's interpreter and in ttsem. Only a GPU can tell that a row of a tensor core's
product does not depend on the row's place in the tile. Blocks with values that are not finite are outside the promise.

A value that is infinite or NaN must stay with the queries that see it, but 0 * inf is NaN, and a block's rows share
tiles. A block whose result is not finite is therefore computed again, with such values taken out of the products.

A kernel is compiled again for each constant and, where Triton specialises an argument, for each kind of value. What
changes from round to round is therefore neither: tests/test_gpu_variants.py counts. Nothing on the host depends on a
length. `python -m bench roofline` counts how often a prefix is read: once a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_kernels.ops.fork_attention import fork_attention_ref
from stars_kernels.ops.triton._launch import on_device_of

SPLIT_KEYS = 256  # of a prefix in one part
MAX_SPLITS = 16  # of a prefix; one of more than SPLIT_KEYS * MAX_SPLITS keys has longer splits
TARGET_PROGRAMS = 264  # two for each multiprocessor of an H100
WHOLE_SPLITS = 8  # that one program reads where there are TARGET_PROGRAMS blocks; elsewhere 1
LEAST_READERS = 4  # programs for a prefix of more
WORKSPACE = 128 << 20  # bytes at most of parts between the two kernels

PART_M = tl.constexpr(16)  # queries that share a tile where values are not finite
MERGE_WARPS = 1


def settings(dtype: torch.dtype, size: int) -> dict[str, int]:
    """Launch settings for heads of `size` (the larger of Dk and Dv): queries and keys of a tile, and the rest."""
    if dtype == torch.float32:  # no tensor cores: IEEE products from registers
        return {"block_m": 16, "block_n": 32 if size <= 64 else 16, "num_warps": 8, "num_stages": 1}
    if size <= 128:  # 64 queries, or 4 warps for 128 features, spill on sm_80
        return {"block_m": 32, "block_n": 32, "num_warps": 4 if size <= 64 else 8, "num_stages": 3}
    return {"block_m": 32, "block_n": 32, "num_warps": 8, "num_stages": 2}


class Plan(NamedTuple):
    """How a launch is cut: a matter of speed and memory, on which no bit of a result depends."""

    together: int  # rows side by side whose blocks one program computes, one after the other where prompts differ
    row_blocks: int  # blocks for the queries of one row: more than 1 only where `together` is 1
    readers: int  # programs among which the parts of a block are dealt
    whole: int  # splits of a prefix up to which one program reads all parts, and nothing is stored
    stored: int  # parts of a query for which there is room; 0: `whole` excludes none


def plan(rows: int, prompts: int, slots: int, per_row: int, kv_heads: int, value_size: int, block_m: int) -> Plan:
    """The cut for `rows` rows of `per_row` queries a key/value head; the arena has `slots` places for all prompts.

    Room for parts: stored * rows * per_row * kv_heads * (value_size + 2) * 4 bytes, with stored <= MAX_SPLITS + 1 and
    no more than WORKSPACE in all: where it would take more, there are queries enough to fill a GPU without.
    """
    fitting, usual = max(1, block_m // per_row), triton.cdiv(rows, max(1, prompts))
    together = triton.cdiv(usual, triton.cdiv(usual, fitting))  # a prompt's usual number of rows in equal parts
    row_blocks = triton.cdiv(per_row, block_m)
    blocks = triton.cdiv(rows, together) * row_blocks * kv_heads
    most = min(MAX_SPLITS, triton.cdiv(slots, SPLIT_KEYS))
    whole = 1 if blocks < TARGET_PROGRAMS else WHOLE_SPLITS
    if most <= whole or (most + 1) * rows * per_row * kv_heads * (value_size + 2) * 4 > WORKSPACE:
        return Plan(together, row_blocks, readers=1, whole=MAX_SPLITS, stored=0)
    readers = min(most + 1, max(LEAST_READERS, triton.cdiv(TARGET_PROGRAMS, blocks)))
    return Plan(together, row_blocks, readers, whole, most + 1)


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
    cut = plan(rows, prompts, arena_key.shape[0], steps * group, kv_heads, value_size, use["block_m"])
    size = rows * steps * heads
    partial = out.new_empty(cut.stored, *out.shape, dtype=torch.float32)
    stats = out.new_empty(2, cut.stored, size, dtype=torch.float32)  # maximum, sum
    constants = {
        "GROUP": group, "DV": value_size, "WINDOW": window > 0, "BLOCK_N": use["block_n"], "SPLIT_KEYS": SPLIT_KEYS,
        "MAX_SPLITS": MAX_SPLITS, "enable_fp_fusion": True,
    }  # fmt: skip
    with on_device_of(query):
        _fork_attention[(triton.cdiv(rows, cut.together) * cut.row_blocks, kv_heads, cut.readers)](
            query, suffix_key, suffix_value, suffix_len, query_len, arena_key, arena_value, offsets, lengths,
            prompt, sinks, out, partial, stats, rows, steps, size, *cut[:2], cut.whole, cut.stored,
            scale, window, softcap,
            *query.stride()[:3], *suffix_key.stride()[:3], *suffix_value.stride()[:3],
            *arena_key.stride()[:2], *arena_value.stride()[:2],
            DK=key_size, SOFTCAP=softcap > 0, BLOCK_M=use["block_m"],
            BLOCK_DK=max(16, triton.next_power_of_2(key_size)), BLOCK_DV=max(16, triton.next_power_of_2(value_size)),
            num_warps=use["num_warps"], num_stages=use["num_stages"], **constants,
        )  # fmt: skip
        if cut.stored:
            _merge[(rows * steps, kv_heads)](
                partial, stats, lengths, prompt, sinks, out, steps, size, cut.whole, cut.stored, window,
                HEADS=triton.next_power_of_2(group), BLOCK_DV=triton.next_power_of_2(value_size),
                num_warps=MERGE_WARPS, **constants,
            )  # fmt: skip
    return out


@triton.jit(
    do_not_specialize=["rows", "steps", "size", "together", "row_blocks", "whole", "stored", "window"],
    do_not_specialize_on_alignment=["suffix_len", "query_len", "offsets", "lengths", "prompt"],
)
def _fork_attention(
    query, suffix_key, suffix_value, suffix_len, query_len, arena_key, arena_value, offsets, lengths, prompt,
    sinks, out, partial, stats, rows, steps, size, together, row_blocks, whole, stored, scale, window, softcap,
    query_row, query_step, query_head, key_row, key_slot, key_head, value_row, value_slot, value_head,
    prefix_key_slot, prefix_key_head, prefix_value_slot, prefix_value_head,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SPLIT_KEYS: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Parts of blocks: program (rows side by side and block of a row, key/value head, reader)."""
    kv_head, reader, readers = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    heads = tl.num_programs(1) * GROUP
    query += kv_head * GROUP * query_head
    suffix_key += kv_head * key_head
    suffix_value += kv_head * value_head

    row = tl.program_id(0) // row_blocks * together
    last_row = tl.minimum(row + together, rows)
    skipped = tl.program_id(0) % row_blocks * BLOCK_M
    while row < last_row:
        owner = tl.load(prompt + row)
        other = row + tl.arange(0, BLOCK_M)
        own = tl.load(prompt + other, mask=other < last_row, other=-1) == owner
        end_row = tl.min(tl.where(own, last_row, other))
        queries = tl.minimum((end_row - row) * steps * GROUP - skipped, BLOCK_M)

        slot = tl.load(offsets + owner).to(tl.int64)
        prefix = tl.load(lengths + owner).to(tl.int32)
        keys = arena_key + slot * prefix_key_slot + kv_head * prefix_key_head
        values = arena_value + slot * prefix_value_slot + kv_head * prefix_value_head
        begin, share, splits = _splits(prefix, window, WINDOW, SPLIT_KEYS, MAX_SPLITS, BLOCK_N)
        dealt = splits > whole
        for part in tl.range(reader, tl.where(dealt, splits + 1, 1), readers, disable_licm=True):
            first = tl.where(dealt, part, 0)
            last = tl.where(dealt, tl.minimum(part + 1, splits), splits)
            place = tl.where(dealt, part, -1)
            apart = _block(
                query, suffix_key, suffix_value, suffix_len, query_len, keys, values, sinks, out, partial, stats,
                row, skipped, skipped + queries, prefix, begin, share, first, last, splits, place, stored,
                kv_head, heads, steps, size, scale, window, softcap,
                query_row, query_step, query_head, key_row, key_slot, value_row, value_slot,
                prefix_key_slot, prefix_value_slot,
                GROUP, DK, DV, WINDOW, SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_DK, BLOCK_DV, False,
            )  # fmt: skip
            # What every piece needs is computed in each: held across the first pass, it would cost that registers.
            for piece in tl.range(0, apart * queries, PART_M, disable_licm=True):
                _block(
                    query, suffix_key, suffix_value, suffix_len, query_len, keys, values, sinks, out, partial, stats,
                    row, skipped + piece, skipped + queries, prefix, begin, share, first, last, splits, place, stored,
                    kv_head, heads, steps, size, scale, window, softcap,
                    query_row, query_step, query_head, key_row, key_slot, value_row, value_slot,
                    prefix_key_slot, prefix_value_slot,
                    GROUP, DK, DV, WINDOW, SOFTCAP, PART_M, BLOCK_N, BLOCK_DK, BLOCK_DV, True,
                )  # fmt: skip
        row = end_row


@triton.jit
def _splits(
    prefix, window, WINDOW: tl.constexpr, SPLIT_KEYS: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The first key of a prefix that any query may see, the keys of a split, the number of splits."""
    begin = 0
    if WINDOW:
        begin = tl.maximum(prefix - window + 1, 0) // BLOCK_N * BLOCK_N
    share = tl.maximum(tl.cdiv(prefix - begin, MAX_SPLITS * BLOCK_N) * BLOCK_N, SPLIT_KEYS)
    return begin, share, tl.cdiv(prefix - begin, share)


@triton.jit
def _block(
    query, suffix_key, suffix_value, suffix_len, query_len, keys, values, sinks, out, partial, stats,
    first_row, first, end, prefix, begin, share, split, last_split, splits, place, stored,
    kv_head, heads, steps, size, scale, window, softcap,
    query_row, query_step, query_head, key_row, key_slot, value_row, value_slot,
    prefix_key_slot, prefix_value_slot,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Queries `first` to `end` of rows from `first_row` on, up to BLOCK_M, over `split` to `last_split` of the prefix.

    place: -1 for the result of all parts, and else that of the one part to store; the last one is the suffixes.
    Not APART: whether the result is not finite, and not written.
    """
    per_row = steps * GROUP
    m = first + tl.arange(0, BLOCK_M)  # [M] queries: (row, step, head of the group)
    row = first_row + m // per_row
    step = m // GROUP % steps
    asked = tl.load(query_len + row, mask=m < end, other=0)
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
    for part in range(split, last_split):
        part_high, part_total, part_acc = _nothing(BLOCK_M, BLOCK_DV)
        stop = tl.minimum(begin + (part + 1) * share, prefix)
        for start in range(begin + part * share, stop, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            there = n < stop
            k_at, v_at = keys + n.to(tl.int64) * prefix_key_slot, values + n.to(tl.int64) * prefix_value_slot
            k = tl.load(k_at[None, :] + dk[:, None], mask=there[None, :] & (dk < DK)[:, None], other=0.0)
            v = tl.load(v_at[:, None] + dv, mask=there[:, None] & (dv < DV), other=0.0)
            visible = asks[:, None] & there[None, :]
            if WINDOW:
                visible &= (prefix + at)[:, None] - n[None, :] < window
            part_high, part_total, part_acc = _attend(
                q, k, v, visible, part_high, part_total, part_acc, scale, softcap, SOFTCAP, APART
            )
        high, total, acc = _fold(high, total, acc, part_high, part_total, part_acc)

    if (place < 0) | (place == splits):
        # The rows' suffixes, each from a multiple of `span` on.
        used = tl.max(tl.where(asks, at + 1, 0))  # slots that any query sees
        span = tl.where(used <= 16, 16, tl.where(used <= 32, 32, tl.cdiv(used, BLOCK_N) * BLOCK_N))
        near_row, far_row = first_row + first // per_row, first_row + (end - 1) // per_row
        part_high, part_total, part_acc = _nothing(BLOCK_M, BLOCK_DV)
        for start in tl.range(0, (far_row - near_row + 1) * span, BLOCK_N, num_stages=1):
            n = start + tl.arange(0, BLOCK_N)
            n_row, slot = near_row + n // span, n % span
            there = n_row <= far_row
            there &= slot < tl.load(suffix_len + n_row, mask=there, other=0)
            k_at = suffix_key + n_row.to(tl.int64) * key_row + slot.to(tl.int64) * key_slot
            v_at = suffix_value + n_row.to(tl.int64) * value_row + slot.to(tl.int64) * value_slot
            k = tl.load(k_at[None, :] + dk[:, None], mask=there[None, :] & (dk < DK)[:, None], other=0.0)
            v = tl.load(v_at[:, None] + dv, mask=there[:, None] & (dv < DV), other=0.0)
            back = at[:, None] - slot[None, :]
            visible = asks[:, None] & there[None, :] & (row[:, None] == n_row[None, :]) & (back >= 0)
            if WINDOW:
                visible &= back < window
            part_high, part_total, part_acc = _attend(
                q, k, v, visible, part_high, part_total, part_acc, scale, softcap, SOFTCAP, APART
            )
        high, total, acc = _fold(high, total, acc, part_high, part_total, part_acc)

    apart = 0
    if not APART:
        apart = 1 - tl.min((tl.abs(acc) < float("inf")).to(tl.int32))
    written = m < tl.where(apart > 0, 0, end)
    at_out = ((row.to(tl.int64) * steps + step) * heads + kv_head * GROUP) + m % GROUP
    if place < 0:
        result = _normalised(high, total, acc, sinks, kv_head * GROUP + m % GROUP)
        tl.store(out + at_out[:, None] * DV + dv, result.to(out.dtype.element_ty), written[:, None] & (dv < DV))
    else:
        begin_out = place.to(tl.int64) * size
        tl.store(partial + (begin_out + at_out)[:, None] * DV + dv, acc, mask=written[:, None] & (dv < DV))
        tl.store(stats + begin_out + at_out, high, mask=written)
        tl.store(stats + stored.to(tl.int64) * size + begin_out + at_out, total, mask=written)
    return apart


@triton.jit
def _nothing(BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """A softmax of no key: maximum, sum, accumulator."""
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return high, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)


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
def _fold(high, total, acc, part_high, part_total, part_acc):
    """The softmax of the keys of both: maxima [M], sums [M], accumulators [M, Dv] relative to the maxima.

    What is fused is said, not left to the compiler: both kernels must round alike.
    """
    highest = tl.maximum(high, part_high)
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    keep, part_keep = tl.exp(high - reference), tl.exp(part_high - reference)
    return (
        highest, tl.fma(total, keep, part_total * part_keep),
        tl.fma(acc, keep[:, None], part_acc * part_keep[:, None]),
    )  # fmt: skip


@triton.jit
def _normalised(high, total, acc, sinks, head):
    """acc [M, Dv] over the softmax's sum; a sink takes part in that sum alone."""
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32)
        reference = tl.maximum(high, sink)
        keep = tl.exp(high - reference)
        acc, total = acc * keep[:, None], tl.fma(total, keep, tl.exp(sink - reference))
    return acc / total[:, None]


@triton.jit(
    do_not_specialize=["steps", "size", "whole", "stored", "window"],
    do_not_specialize_on_alignment=["lengths", "prompt"],
)
def _merge(
    partial, stats, lengths, prompt, sinks, out, steps, size, whole, stored, window,
    GROUP: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr, SPLIT_KEYS: tl.constexpr, MAX_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, HEADS: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The heads of a group at one step of a row, whose parts were stored: these are folded in order."""
    owner = tl.load(prompt + tl.program_id(0) // steps)
    prefix = tl.load(lengths + owner).to(tl.int32)
    _, _, splits = _splits(prefix, window, WINDOW, SPLIT_KEYS, MAX_SPLITS, BLOCK_N)
    if splits <= whole:
        return
    g, dv = tl.arange(0, HEADS), tl.arange(0, BLOCK_DV)
    head = tl.program_id(1) * GROUP + g
    at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) * GROUP + head
    there = (g < GROUP)[:, None] & (dv < DV)
    high, total, acc = _nothing(HEADS, BLOCK_DV)
    for part in range(0, splits + 1):
        place = size.to(tl.int64) * part + at
        part_high = tl.load(stats + place, mask=g < GROUP, other=0.0)
        part_total = tl.load(stats + stored.to(tl.int64) * size + place, mask=g < GROUP, other=1.0)
        part_acc = tl.load(partial + place[:, None] * DV + dv, mask=there, other=0.0)
        high, total, acc = _fold(high, total, acc, part_high, part_total, part_acc)
    head = tl.minimum(head, tl.num_programs(1) * GROUP - 1)  # beyond the group nothing is stored
    result = _normalised(high, total, acc, sinks, head)
    tl.store(out + at[:, None] * DV + dv, result.to(out.dtype.element_ty), mask=there)
