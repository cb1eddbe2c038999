"""kv_commit on a GPU: the tokens of all layers in one launch of 16-byte copies, then the lengths in another.

A segment's tokens lie side by side in the suffix and in the arena, so each layer's keys (or values) are one copy of
`count * Hkv * D` elements. The copy is of bytes: one kernel serves every dtype. The lengths wait for a second launch
because the copying programs read them.
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
    with on_device_of(arena):
        if layers * slots * token:
            _copy[(triton.cdiv(slots * token, block), layers * 2, commits)](
                suffix, into, lengths, offsets, prompt, row, count, *suffix.stride()[:3], *into.stride()[:2],
                lengths.stride(0), offsets.stride(0), prompt.stride(0), row.stride(0), count.stride(0),
                TOKEN=token, BLOCK=block, num_warps=NUM_WARPS,
            )  # fmt: skip
        _advance[(commits,)](
            lengths, prompt, count, advance, lengths.stride(0), prompt.stride(0), count.stride(0), advance.stride(0)
        )
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


@triton.jit
def _copy(
    suffix, arena, lengths, offsets, prompt, row, count,
    suffix_layer, suffix_kv, suffix_row, arena_layer, arena_kv,
    lengths_stride, offsets_stride, prompt_stride, row_stride, count_stride,
    TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block, layer * 2 + kv, commit) copies BLOCK words of a segment's keys or values."""
    layer, kv, commit = tl.program_id(1) // 2, tl.program_id(1) % 2, tl.program_id(2)
    r = tl.load(row + commit * row_stride)
    words = tl.where(r < 0, 0, tl.load(count + commit * count_stride) * TOKEN)
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = word < words
    p = tl.load(prompt + commit * prompt_stride)
    start = tl.load(offsets + p * offsets_stride) + tl.load(lengths + p * lengths_stride)
    suffix += layer.to(tl.int64) * suffix_layer + kv * suffix_kv + r * suffix_row
    arena += layer.to(tl.int64) * arena_layer + kv * arena_kv + start * TOKEN
    tl.store(arena + word, tl.load(suffix + word, mask=mask), mask=mask)


@triton.jit
def _advance(lengths, prompt, count, advance, lengths_stride, prompt_stride, count_stride, advance_stride):
    commit = tl.program_id(0)
    if tl.load(advance + commit * advance_stride):
        length = lengths + tl.load(prompt + commit * prompt_stride) * lengths_stride
        tl.store(length, tl.load(length) + tl.load(count + commit * count_stride))
