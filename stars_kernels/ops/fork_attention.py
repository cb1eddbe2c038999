"""fork_attention: rows attend to ONE stored prefix of their prompt and to their own short suffix.

The prefix keys and values of prompt p are the arena's places [offset_p, offset_p + length_p), stored once and read once
for all rows of p (their queries are stacked), so `width` candidates cost `width * segment_size` tokens of KV.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stars_kernels.ops.dispatch import call_op
from stars_kernels.ops.registry import define_op
from stars_kernels.ops.validate import check_device, check_dtype, check_shape


def fork_attention(
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
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of each row over its prompt's prefix, then its own suffix.

    Args:
        query: [R, S, Hq, Dk]. A row's queries are the last `query_len` tokens of its suffix; the rest is padding.
        suffix_key, suffix_value: [R, T, Hkv, Dk], [R, T, Hkv, Dv]; tokens from `suffix_len` on are never read.
        suffix_len, query_len: [R] int64, query_len <= min(S, suffix_len), suffix_len <= T.
        arena_key, arena_value: [N, Hkv, Dk], [N, Hkv, Dv]: every prompt's prefix.
        offsets, lengths: [P] int64, the prefix of prompt p is arena[offsets[p] : offsets[p] + lengths[p]].
        prompt: [R] int64, the prompt of each row.
        scale: applied to the scores. window: 0 = all keys, else only those less than `window` tokens back.
        softcap: 0 = off, else softcap * tanh(score / softcap). sinks: [Hq] logits that take part in the softmax's sum.

    Returns:
        [R, S, Hq, Dv] in the dtype of `query`; zero for padded queries.
    """
    rows, _, heads, size = query.shape if query.dim() == 4 else (-1, -1, -1, -1)
    check_shape("query", query, None, None, None, None)
    check_shape("suffix_key", suffix_key, rows, None, None, size)
    kv_heads = suffix_key.shape[2]
    check_shape("suffix_value", suffix_value, rows, suffix_key.shape[1], kv_heads, None)
    check_shape("arena_key", arena_key, None, kv_heads, size)
    check_shape("arena_value", arena_value, arena_key.shape[0], kv_heads, suffix_value.shape[3])
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query has {heads} heads, expected a multiple of the {kv_heads} key/value heads")
    check_shape("offsets", offsets, None)
    check_shape("lengths", lengths, offsets.shape[0])
    check_dtype("offsets", offsets, torch.int64)
    check_dtype("lengths", lengths, torch.int64)
    for name, tensor in (("suffix_len", suffix_len), ("query_len", query_len), ("prompt", prompt)):
        check_shape(name, tensor, rows)
        check_dtype(name, tensor, torch.int64)
    for name, tensor in (
        ("suffix_key", suffix_key), ("suffix_value", suffix_value),
        ("arena_key", arena_key), ("arena_value", arena_value),
    ):  # fmt: skip
        check_dtype(name, tensor, query.dtype)
    if sinks is not None:
        check_shape("sinks", sinks, heads)
    if window < 0 or softcap < 0:
        raise ValueError(f"{window=} {softcap=}, expected both >= 0")
    check_device(
        query, suffix_key=suffix_key, suffix_value=suffix_value, suffix_len=suffix_len, query_len=query_len,
        arena_key=arena_key, arena_value=arena_value, offsets=offsets, lengths=lengths, prompt=prompt, sinks=sinks,
    )  # fmt: skip
    return call_op(
        _NAME, query, suffix_key, suffix_value, suffix_len, query_len, arena_key, arena_value, offsets, lengths,
        prompt, scale, window, softcap, sinks,
    )  # fmt: skip


def fork_attention_ref(
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
    """The definition: each run of rows of one prompt at a time, their queries stacked."""
    rows, steps, heads, _ = query.shape
    out = query.new_empty(rows, steps, heads, suffix_value.shape[3])
    owners, counts = prompt.unique_consecutive(return_counts=True)
    slots, sizes, stop = offsets.tolist(), lengths.tolist(), 0
    for owner, count in zip(owners.tolist(), counts.tolist(), strict=True):
        run = slice(stop, stop + count)
        prefix = slice(slots[owner], slots[owner] + sizes[owner])
        out[run] = _attend(
            query[run], suffix_key[run], suffix_value[run], suffix_len[run], query_len[run],
            arena_key[prefix], arena_value[prefix], scale, window, softcap, sinks,
        )  # fmt: skip
        stop += count
    return out


def _attend(
    query: Tensor,  # [w, S, Hq, Dk]
    suffix_key: Tensor,  # [w, T, Hkv, Dk]
    suffix_value: Tensor,  # [w, T, Hkv, Dv]
    suffix_len: Tensor,  # [w]
    query_len: Tensor,  # [w]
    prefix_key: Tensor,  # [n, Hkv, Dk]
    prefix_value: Tensor,  # [n, Hkv, Dv]
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    w, steps, heads, _ = query.shape
    n, kv_heads, _ = prefix_key.shape
    group = heads // kv_heads
    used = int(suffix_len.max())
    columns = torch.arange(used, device=query.device)
    suffix_key, suffix_value = suffix_key[:, :used], suffix_value[:, :used]
    if int(suffix_len.min()) < used:
        # What lies past suffix_len may be anything, NaN too, and 0 * NaN is NaN: such values must be replaced.
        suffix_value = suffix_value.where((columns < suffix_len[:, None])[:, :, None, None], 0.0)

    q = query.unflatten(2, (kv_heads, group)).permute(2, 0, 1, 3, 4).flatten(2, 3)  # [Hkv, w, S*G, Dk]
    prefix_scores = (q.flatten(1, 2) @ prefix_key.permute(1, 2, 0)).unflatten(1, (w, steps, group))  # [Hkv, w, S, G, n]
    suffix_scores = (q @ suffix_key.permute(2, 0, 3, 1)).unflatten(2, (steps, group))  # [Hkv, w, S, G, T]

    scores = torch.cat((prefix_scores, suffix_scores), dim=-1)
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    step = torch.arange(steps, device=query.device)
    at = suffix_len[:, None] - query_len[:, None] + step  # [w, S] place of each query in its suffix
    back = at[:, :, None] - torch.arange(-n, used, device=query.device)  # [w, S, n+T] tokens between query and key
    hidden = (back < 0) | (back >= window) if window else back < 0
    scores = scores.masked_fill(hidden[:, :, None], -torch.inf)  # last: no scale and no cap may change what is hidden
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(kv_heads, 1, 1, group, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(dim=-1)[..., : n + used].to(query.dtype).flatten(2, 3)  # [Hkv, w, S*G, n+T]
    from_prefix = weights[..., :n].flatten(1, 2) @ prefix_value.transpose(0, 1)  # [Hkv, w*S*G, Dv]
    out = from_prefix.unflatten(1, (w, -1)) + weights[..., n:] @ suffix_value.permute(2, 0, 1, 3)
    out = out.unflatten(2, (steps, group)).permute(1, 2, 0, 3, 4).flatten(2, 3)  # [w, S, Hq, Dv]
    if int(query_len.min()) < steps:
        out = out.where((step < query_len[:, None])[:, :, None, None], 0.0)
    return out


def _fake(query: Tensor, suffix_key: Tensor, suffix_value: Tensor, *rest: object) -> Tensor:
    return query.new_empty(*query.shape[:3], suffix_value.shape[3])


_NAME = define_op(
    "fork_attention(Tensor query, Tensor suffix_key, Tensor suffix_value, Tensor suffix_len, Tensor query_len, "
    "Tensor arena_key, Tensor arena_value, Tensor offsets, Tensor lengths, Tensor prompt, float scale, int window, "
    "float softcap, Tensor? sinks) -> Tensor",
    fork_attention_ref,
    _fake,
)
