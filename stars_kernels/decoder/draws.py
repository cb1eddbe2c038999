"""How one attempt's next token is drawn, and the entropy of what it is drawn from: the definitions, for one row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stars_kernels.decoder.rules import Draw
from stars_kernels.ops.philox import STREAM_SAMPLE
from stars_kernels.ops.segment_sample import segment_sample_ref


def draw(
    logits: Tensor, how: Draw, key: int, attempt: int, position: int, sampling: dict[str, Any]
) -> tuple[int, float]:
    """Return the token of attempt `attempt` at a position of the answer, and its log-probability (`Candidate.logprob`).

    logits: [V]. key: of the request. sampling: temperature, top_k, top_p, min_p.
    """
    if how == "likeliest":
        token = logits.sort(descending=True, stable=True).indices[attempt]
        return int(token), logits.double().log_softmax(0)[token].item()
    keys, attempts, positions = (torch.tensor([number]) for number in (key, attempt, position))
    filters = (sampling["temperature"], sampling["top_k"], sampling["top_p"], sampling["min_p"])
    token, logprob = segment_sample_ref(logits[None], keys, attempts, positions, None, *filters, STREAM_SAMPLE)
    return int(token), logprob.item()


def entropy(logits: Tensor) -> float:
    """Return the entropy of softmax(logits [V]), in nats."""
    return torch.special.entr(logits.double().softmax(0)).sum().item()
