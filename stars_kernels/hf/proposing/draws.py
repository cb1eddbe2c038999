"""What rules ask of logits besides a sampled token: their entropy, and the likeliest tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy in nats of softmax(logits [R, V]), [R] float64; NaN where a row holds NaN or +inf.

    Summed in order, so that a row's bits do not depend on the rows beside it.
    """
    p, log_p = logits.softmax(-1, _precise(logits)), logits.log_softmax(-1, _precise(logits))
    return -(p * log_p).masked_fill(p == 0, 0.0).cumsum(-1, dtype=torch.float64)[:, -1]


def likeliest(logits: Tensor, source: Tensor | None, attempt: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Take the token with the attempt-th largest logit, of equal ones the smaller id.

    Args:
        logits: [N, V], any float dtype. source: [R] int64, each row's row of `logits`; None where N == R.
        attempt: [R] int64, below `count` <= V.

    Returns:
        token [R] int64, -1 where the row's logits hold NaN or +inf, or no finite value;
        logprob [R] of softmax(logits), float32 or, of float64 logits, float64.
    """
    bad = ~logits.amax(dim=-1).isfinite()
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    logprobs = logits.log_softmax(-1, _precise(logits)).gather(1, ids)
    if source is not None:
        ids, logprobs, bad = ids[source], logprobs[source], bad[source]
    token, logprob = (column.gather(1, attempt[:, None])[:, 0] for column in (ids, logprobs))
    return token.masked_fill(bad, -1), logprob.masked_fill(bad, torch.nan)


def _precise(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
