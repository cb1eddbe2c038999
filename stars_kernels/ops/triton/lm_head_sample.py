"""lm_head_sample on a GPU: each tile of logits races in registers and leaves four numbers a row.

    race       [blocks of rows, blocks of the vocabulary]  the tile's winner, its score, the maximum, the softmax sum
    finish     [R]                                         merges a row's sums in order; the tiles' winners race

A tile's race is shifted by its own maximum, that of the winners by the row's, as in `segment_sample`.

The weights are read once a block of rows: 64 rows wait for them together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_kernels.ops.lm_head_sample import lm_head_sample_ref
from stars_kernels.ops.triton._launch import on_device_of
from stars_kernels.ops.triton.philox import log, noise, token_bits, token_words
from stars_kernels.ops.triton.segment_sample import MAX_VOCABULARY, NO_ID, UNIT, _below, _exp_from, _mass

BLOCK_V = 128
NUM_STAGES = 3
FINISH_WARPS = 4


def settings(dtype: torch.dtype, rows: int) -> dict[str, int]:
    """Launch settings: rows and depth of a tile, warps."""
    block_r = max(16, triton.next_power_of_2(rows))
    if dtype == torch.float32:  # no tensor cores: IEEE products from registers
        return {"BLOCK_R": min(32, block_r), "BLOCK_D": 32, "num_warps": 4}
    return {"BLOCK_R": min(64, block_r), "BLOCK_D": 64, "num_warps": 8}


def lm_head_sample_triton(
    hidden: Tensor, weight: Tensor, keys: Tensor, attempt: Tensor, position: Tensor, temperature: float, stream: int
) -> tuple[Tensor, Tensor]:
    """See `ops.lm_head_sample`; products in fp32. float64 and huge vocabularies run the definition."""
    (rows, size), vocabulary = hidden.shape, weight.shape[0]
    if hidden.dtype == torch.float64 or vocabulary > MAX_VOCABULARY:
        return lm_head_sample_ref(hidden, weight, keys, attempt, position, temperature, stream)
    token = torch.empty_like(keys, memory_format=torch.contiguous_format)
    logprob = hidden.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return token, logprob
    hidden, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (hidden, weight))
    keys, attempt, position = keys.contiguous(), attempt.contiguous(), position.contiguous()
    blocks = triton.cdiv(vocabulary, BLOCK_V)
    numbers = hidden.new_empty(2, rows, blocks, dtype=torch.float32)  # the winner's score, the maximum
    winners = hidden.new_empty(rows, blocks, dtype=torch.int32)
    mass = hidden.new_empty(rows, blocks, dtype=torch.int64)
    use = settings(hidden.dtype, rows)
    with on_device_of(hidden):
        _lm_head_race[(triton.cdiv(rows, use["BLOCK_R"]), blocks)](
            hidden, weight, keys, attempt, position, numbers, winners, mass, rows, rows * blocks, vocabulary,
            hidden.stride(0), weight.stride(0), temperature, stream,
            SIZE=size, BLOCK_V=BLOCK_V, **use, num_stages=NUM_STAGES, enable_fp_fusion=False,
        )  # fmt: skip
        _lm_head_finish[(rows,)](
            keys, attempt, position, stream, numbers, winners, mass, token, logprob, rows * blocks, blocks,
            BLOCKS=triton.next_power_of_2(blocks), num_warps=FINISH_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return token, logprob


@triton.jit(
    do_not_specialize=["rows", "plane", "stream"],
    do_not_specialize_on_alignment=["keys", "attempt", "position"],
)
def _lm_head_race(
    hidden, weight, keys, attempt, position, numbers, winners, mass, rows, plane, vocabulary, hidden_row,
    weight_row, temperature, stream,
    SIZE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Blocks of rows come first in the grid: those that read the same weights run side by side."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    block = tl.program_id(1)
    ids = block * BLOCK_V + tl.arange(0, BLOCK_V)
    there, known = row < rows, ids < vocabulary
    h = hidden + row.to(tl.int64)[:, None] * hidden_row
    w = weight + ids.to(tl.int64)[None, :] * weight_row
    acc = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for start in range(0, SIZE, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a = tl.load(h + d[None, :], mask=there[:, None] & (d < SIZE)[None, :], other=0.0)
        b = tl.load(w + d[:, None], mask=known[None, :] & (d < SIZE)[:, None], other=0.0)
        acc = tl.dot(a, b, acc=acc, input_precision="ieee")
    x = tl.div_rn(acc.to(hidden.dtype.element_ty).to(tl.float32), temperature)
    x = tl.where(x != x, float("inf"), x)  # a NaN shows in the maximum
    x = tl.where(known[None, :], x, -float("inf"))

    words = block * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4)
    blank = tl.zeros([BLOCK_R, 1], tl.int32)
    k = tl.load(keys + row, mask=there, other=0)[:, None]
    n = tl.load(attempt + row, mask=there, other=0)[:, None]
    p = tl.load(position + row, mask=there, other=0)[:, None]
    w0, w1, w2, w3 = token_words(words[None, :] + blank, k, p, n, stream)
    bits = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # [BLOCK_R, BLOCK_V], by id
    largest = tl.max(x, axis=1)
    key = noise(bits) - _below(x, largest[:, None])
    winner = tl.min(tl.where(key == tl.min(key, axis=1)[:, None], ids[None, :], NO_ID), axis=1)
    out = row.to(tl.int64) * tl.num_programs(1) + block
    tl.store(numbers + out, tl.max(tl.where(ids[None, :] == winner[:, None], x, -float("inf")), axis=1), mask=there)
    tl.store(numbers + plane + out, largest, mask=there)
    tl.store(winners + out, winner, mask=there)
    tl.store(mass + out, tl.sum(_mass(x, largest[:, None]), axis=1), mask=there)


@triton.jit(
    do_not_specialize=["plane", "stream"],
    do_not_specialize_on_alignment=["keys", "attempt", "position"],
)
def _lm_head_finish(
    keys, attempt, position, stream, numbers, winners, mass, token, logprob, plane, blocks, BLOCKS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = row * blocks + tl.arange(0, BLOCKS)
    inside = tl.arange(0, BLOCKS) < blocks
    score = tl.load(numbers + at, mask=inside, other=-float("inf"))
    largest = tl.load(numbers + plane + at, mask=inside, other=-float("inf"))
    ids = tl.load(winners + at, mask=inside, other=NO_ID)
    best = tl.max(largest)
    part = tl.load(mass + at, mask=inside, other=0).to(tl.float32) * _exp_from(largest, best)
    bits = token_bits(ids, tl.load(keys + row), tl.load(position + row), tl.load(attempt + row), stream)
    key = noise(bits) - _below(score, best)
    winner = tl.min(tl.where(key == tl.min(key), ids, NO_ID))
    score = tl.max(tl.where(ids == winner, score, -float("inf")))
    total = tl.sum(part.to(tl.int64)).to(tl.float32) / UNIT
    good = tl.abs(best) < float("inf")
    tl.store(token + row, tl.where(good, winner, -1).to(tl.int64))
    tl.store(logprob + row, tl.where(good, score - best - log(total), float("nan")))
