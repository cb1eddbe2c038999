"""segment_sample: draw the next token of each row from its filtered distribution, without sorting out a winner by rank.

Filters apply in HF's order: temperature, top-k (ties with the k-th stay), top-p (the shortest prefix in (probability
descending, id ascending) whose mass reaches top_p), min-p. Survivors then race: with x the token's own 32 Philox bits
and v = min((x + 1/2) 2^-32, 1 - 2^-24), the smallest  log(-log1p(-v)) - (logit / T - m)  wins, where m is the row's
largest logit / T (fp32, ties to the smallest id). That is Gumbel-max with the tail at v -> 0, where fp32 is exact
enough. Without m, large logits would round the noise away: equal ones would not be drawn equally.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stars_kernels.ops.dispatch import call_op
from stars_kernels.ops.philox import STREAM_SAMPLE, token_bits
from stars_kernels.ops.registry import define_op
from stars_kernels.ops.validate import check_device, check_dtype, check_shape

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-30, 1e30  # in fp32, neither these nor their reciprocals overflow


def segment_sample(
    logits: Tensor,
    keys: Tensor,
    attempt: Tensor,
    position: Tensor,
    *,
    source: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stream: int = STREAM_SAMPLE,
) -> tuple[Tensor, Tensor]:
    """Sample one token per row.

    Args:
        logits: [N, V], any float dtype; the arithmetic is fp32.
        keys, attempt, position: [R] int64, the row's Philox key, its attempt (< 2^24) and the token's position in the
            answer (< 2^32).
        source: [R] int64, the row of `logits` each row draws from (many attempts share one); None when N == R.
        temperature: 1e-30 to 1e30. top_k: off at 0 and from V on. top_p: in (0, 1], 1 = off. min_p: in [0, 1), 0 = off.

    Returns:
        token [R] int64, -1 where the row's logits hold NaN or +inf, or no finite value;
        logprob [R] float32 under the filtered distribution, NaN where token is -1.
    """
    check_shape("keys", keys, None)
    rows = keys.shape[0]
    check_shape("logits", logits, rows if source is None else None, None)
    if logits.shape[1] == 0:
        raise ValueError("logits has an empty vocabulary")
    for name, tensor in (("keys", keys), ("attempt", attempt), ("position", position), ("source", source)):
        if tensor is not None:
            check_shape(name, tensor, rows)
            check_dtype(name, tensor, torch.int64)
    check_device(logits, keys=keys, attempt=attempt, position=position, source=source)
    if not logits.is_floating_point():
        raise ValueError(f"logits has dtype {logits.dtype}, expected a float dtype")
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise ValueError(f"temperature is {temperature}, expected {MIN_TEMPERATURE} to {MAX_TEMPERATURE}")
    if not 0 <= stream < 256:
        raise ValueError(f"stream is {stream}, expected 0 to 255")
    if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p < 1:
        raise ValueError(f"{top_k=} {top_p=} {min_p=}, expected top_k >= 0, 0 < top_p <= 1, 0 <= min_p < 1")
    top_k = min(top_k, logits.shape[1])  # the dispatcher takes no integer above 2^63
    return call_op(_NAME, logits, keys, attempt, position, source, temperature, top_k, top_p, min_p, stream)


def segment_sample_ref(
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
    """The definition."""
    scores = logits.float() / temperature
    bad = ~scores.amax(dim=-1).isfinite()  # NaN, +inf, or nothing but -inf
    scores = scores.masked_fill(bad[:, None], 0.0)
    scores, ids = filter_scores(scores, top_k, top_p, min_p)  # [N, M]
    logprobs = scores.log_softmax(dim=-1)
    scores = scores - scores.amax(dim=-1, keepdim=True)
    if source is not None:
        scores, logprobs, bad = scores[source], logprobs[source], bad[source]  # [R, M]
        ids = None if ids is None else ids[source]
    if ids is None or ids.shape[1] > logits.shape[1] // 4:  # four ids share a Philox call: cheaper to make all
        bits = token_bits(keys, logits.shape[1], position, attempt, stream)
        bits = bits if ids is None else bits.gather(1, ids)
    else:
        bits = token_bits(keys, ids, position, attempt, stream)
    v = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    race = torch.log(-torch.log1p(-v)) - scores
    if ids is None:
        column = race.argmin(dim=-1, keepdim=True)
        token = column.squeeze(-1)
    else:  # the smallest id among equal keys
        best = race.amin(dim=-1, keepdim=True)
        token, column = ids.masked_fill(race > best, torch.iinfo(torch.int64).max).min(dim=-1, keepdim=True)
        token = token.squeeze(-1)
    logprob = logprobs.gather(1, column).squeeze(-1)
    return token.masked_fill(bad, -1), logprob.masked_fill(bad, torch.nan)


def filter_scores(scores: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor | None]:
    """Apply the filters to `scores` [N, V] (logits over temperature, each row with a finite maximum).

    Returns (scores, ids), both [N, M]: candidates in (score descending, id ascending), -inf where filtered out. Without
    a filter: (scores, None), in id order.
    """
    ids: Tensor | None = None
    if 0 < top_k < scores.shape[1] or top_p < 1:
        count = scores.shape[1]
        if 0 < top_k < count and scores.shape[0]:
            kth = scores.topk(top_k).values[:, -1:].clamp(min=torch.finfo(scores.dtype).min)  # -inf is never kept
            count = int((scores >= kth).sum(dim=-1).max())  # ties with the k-th stay
            top, ids = scores.topk(count)
            top = top.masked_fill(top < kth, -torch.inf)
            ids, order = ids.sort(dim=-1)
            scores = top.gather(1, order)
        scores, order = scores.sort(dim=-1, descending=True, stable=True)  # stable: equal scores by ascending id
        ids = order if ids is None else ids.gather(1, order)
    if top_p < 1:
        reached = scores.softmax(dim=-1).cumsum(dim=-1) >= top_p
        scores[:, 1:].masked_fill_(reached[:, :-1], -torch.inf)  # nothing comes before the first: it always stays
    if min_p > 0:
        best = scores.amax(dim=-1, keepdim=True)
        scores = scores.masked_fill((scores - best).exp() < min_p, -torch.inf)
    return scores, ids


def _fake(
    logits: Tensor, keys: Tensor, attempt: Tensor, position: Tensor, source: Tensor | None, *filters: float
) -> tuple[Tensor, Tensor]:
    rows = keys.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)


_NAME = define_op(
    "segment_sample(Tensor logits, Tensor keys, Tensor attempt, Tensor position, Tensor? source, float temperature, "
    "int top_k, float top_p, float min_p, int stream) -> (Tensor token, Tensor logprob)",
    segment_sample_ref,
    _fake,
)
