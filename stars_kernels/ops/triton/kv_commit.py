"""kv_commit on a GPU: the tokens of all layers and the lengths in one launch, by 16-byte copies.

A segment's tokens lie side by side in the suffix and in the arena, so each layer's keys (or values) are one copy of
`count * Hkv * D` elements. The copy is of bytes: one kernel serves every dtype.

All programs of a commit need the length that the commit moves. So each takes it with an atomic addition that also
counts the programs, in the upper half of the length's 64 bits: whoever comes last knows that all others have the old
length, clears the count and moves the length. No other memory is needed, and nothing is left behind.

The host does not wait to look at an offset or a length, so a kernel cannot refuse them. A commit that would lie outside
the slots from its prompt's offset to the arena's end, as with a negative length, is left out: no copy, no move.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stars_kernels.ops.kv_commit import kv_commit_ref
from stars_kernels.ops.triton._launch import on_device_of

BLOCK_BYTES = 8192  # a program's copy: four 16-byte loads a thread
NUM_WARPS = 4
TICKET = tl.constexpr(1 << 32)
HALF = tl.constexpr(1 << 31)  # lengths lie in [-HALF, HALF)


def kv_commit_triton(
    suffix: Tensor, arena: Tensor, lengths: Tensor, offsets: Tensor, prompt: Tensor, row: Tensor, count: Tensor,
    advance: Tensor,
) -> None:  # fmt: skip
    """See `ops.kv_commit`. An arena whose tokens do not lie side by side runs the definition."""
    layers, _, _, slots, heads, size = suffix.shape
    commits = prompt.shape[0]
    if arena.stride()[2:] != (heads * size, size, 1):
        return kv_commit_ref(suffix, arena, lengths, offsets, prompt, row, count, advance)
    if commits == 0:
        return None
    if suffix.stride()[3:] != (heads * size, size, 1):
        suffix = suffix.contiguous()
    word = _word(suffix, arena)
    suffix, into = suffix.view(word), arena.view(word)
    token = heads * suffix.shape[-1]
    block = BLOCK_BYTES // word.itemsize
    blocks = max(1, triton.cdiv(slots * token, block))
    with on_device_of(arena):
        _commit[(blocks, max(1, layers * 2), commits)](
            suffix, into, lengths, offsets, prompt, row, count, advance, *suffix.stride()[:3], *into.stride()[:2],
            lengths.stride(0), offsets.stride(0), prompt.stride(0), row.stride(0), count.stride(0), advance.stride(0),
            arena.shape[2], TOKEN=token if layers else 0, BLOCK=block, num_warps=NUM_WARPS,
        )  # fmt: skip
    return None


def _word(*tensors: Tensor) -> torch.dtype:
    """The largest integer whose bytes divide every head and every stride, up to 4: Triton joins four to 16 bytes."""
    for word in (torch.int32, torch.int16):
        if all(
            n * t.element_size() % word.itemsize == 0
            for t in tensors
            for n in (t.shape[-1], t.storage_offset(), *t.stride()[:-1])
        ):
            return word
    return torch.int8


@triton.jit(
    do_not_specialize=[
        "lengths_stride", "offsets_stride", "prompt_stride", "row_stride", "count_stride", "advance_stride",
        "arena_slots",
    ],
    do_not_specialize_on_alignment=["lengths", "offsets", "prompt", "row", "count", "advance"],
)  # fmt: skip
def _commit(
    suffix, arena, lengths, offsets, prompt, row, count, advance,
    suffix_layer, suffix_kv, suffix_row, arena_layer, arena_kv,
    lengths_stride, offsets_stride, prompt_stride, row_stride, count_stride, advance_stride,
    arena_slots, TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block, layer * 2 + kv, commit) copies BLOCK words of a segment's keys or values."""
    plane, commit = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    p = tl.load(prompt + commit * prompt_stride)
    tokens = tl.load(count + commit * count_stride)
    length = lengths + p * lengths_stride
    taken = tl.atomic_add(length, TICKET, sem="relaxed")
    ticket = (taken + HALF) >> 32
    filled = taken - ticket * TICKET
    offset = tl.load(offsets + p * offsets_stride)
    fits = (offset >= 0) & (filled >= 0) & (offset + filled + tokens <= arena_slots)
    tickets = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    if ticket == tickets - 1:
        moved = tl.where(fits & tl.load(advance + commit * advance_stride), tokens, 0)
        tl.atomic_add(length, moved - tickets * TICKET, sem="relaxed")

    r = tl.load(row + commit * row_stride)
    words = tl.where(fits & (r >= 0), tokens * TOKEN, 0)
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = word < words
    suffix += plane // 2 * suffix_layer + plane % 2 * suffix_kv + r * suffix_row
    arena += plane // 2 * arena_layer + plane % 2 * arena_kv + (offset + filled) * TOKEN
    tl.store(arena + word, tl.load(suffix + word, mask=mask), mask=mask)
