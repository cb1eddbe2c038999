"""A view's logits behind chosen tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from stars_kernels.hf.view.layout import layout_of


def logits_of(model: PreTrainedModel, ids: Tensor, inputs: dict[str, Any], keep: int | Tensor) -> Tensor:
    """Compute logits [B, K, V] after the last `keep` tokens (0 = after all), or after those at indices `keep` [K]."""
    if layout_of(model).keeps_logits:
        return model(input_ids=ids, logits_to_keep=keep, **inputs).logits
    logits = model(input_ids=ids, **inputs).logits
    return logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
