"""kv_commit: write chosen suffixes into the arena, all layers in one call, and move the prefix lengths.

A segment that is only the best so far is written into the unused tail and its length stays: a later fallback then only
moves the length. Rollback needs no op: what is not committed is forgotten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stars_kernels.ops.dispatch import call_op
from stars_kernels.ops.registry import define_op
from stars_kernels.ops.validate import check_device, check_dtype, check_range, check_shape


def kv_commit(
    suffix: Tensor, arena: Tensor, lengths: Tensor, offsets: Tensor, prompt: Tensor, row: Tensor, count: Tensor,
    advance: Tensor,
) -> None:  # fmt: skip
    """For each i: arena[:, :, offsets[p] + lengths[p] + j] = suffix[:, :, row[i], j] for j < count[i], p = prompt[i].

    Args:
        suffix: [L, 2, R, T, Hkv, D]. arena: [L, 2, N, Hkv, D], written in place.
        lengths: [P] int64, moved by count[i] in place where advance[i]. offsets: [P] int64.
        prompt: [C] int64, distinct. row: [C] int64, -1 = nothing to write (its tokens already lie in the tail).
        count: [C] int64 tokens, at most T. advance: [C] bool.

    Raises:
        IndexError: a number is out of range, an offset or a length is negative, or the tokens do not fit the arena;
            nothing was written. A GPU raises nothing, as the host would have to wait for it: there, a commit that does
            not lie between its prompt's offset and the arena's end is left out, its copy and its length.
    """
    check_shape("suffix", suffix, None, 2, None, None, None, None)
    layers, two, _, _, heads, size = suffix.shape
    check_shape("arena", arena, layers, two, None, heads, size)
    check_dtype("arena", arena, suffix.dtype)
    check_shape("lengths", lengths, None)
    check_shape("offsets", offsets, lengths.shape[0])
    check_shape("prompt", prompt, None)
    for name, tensor in (
        ("prompt", prompt),
        ("row", row),
        ("count", count),
        ("lengths", lengths),
        ("offsets", offsets),
    ):
        check_dtype(name, tensor, torch.int64)
    check_dtype("advance", advance, torch.bool)
    for name, tensor in (("row", row), ("count", count), ("advance", advance)):
        check_shape(name, tensor, prompt.shape[0])
    check_device(
        arena, suffix=suffix, lengths=lengths, offsets=offsets, prompt=prompt, row=row, count=count, advance=advance
    )
    call_op(_NAME, suffix, arena, lengths, offsets, prompt, row, count, advance)


def kv_commit_ref(
    suffix: Tensor, arena: Tensor, lengths: Tensor, offsets: Tensor, prompt: Tensor, row: Tensor, count: Tensor,
    advance: Tensor,
) -> None:  # fmt: skip
    """The definition."""
    arena_slots = arena.shape[2]
    check_range("prompt", prompt, 0, len(lengths) - 1)  # all of these before a byte is written
    check_range("row", row, -1, suffix.shape[2] - 1)
    check_range("count", count, 0, suffix.shape[3])
    check_range("offsets", offsets[prompt], 0, arena_slots)
    check_range("lengths", lengths[prompt], 0, arena_slots)
    starts = (offsets + lengths)[prompt].tolist()
    for p, start, n in zip(prompt.tolist(), starts, count.tolist(), strict=True):
        if start + n > arena_slots:
            raise IndexError(f"prompt {p}: {n} tokens from slot {start} on do not fit an arena of {arena_slots}")
    for start, r, n in zip(starts, row.tolist(), count.tolist(), strict=True):
        if r >= 0:
            arena[:, :, start : start + n] = suffix[:, :, r, :n]
    lengths[prompt] += count * advance


def _fake(suffix: Tensor, *rest: Tensor) -> None:
    return None


_NAME = define_op(
    "kv_commit(Tensor suffix, Tensor(a!) arena, Tensor(b!) lengths, Tensor offsets, Tensor prompt, Tensor row, "
    "Tensor count, Tensor advance) -> ()",
    kv_commit_ref,
    _fake,
)
