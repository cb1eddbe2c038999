"""Whether answers of a family in fp32 on a CPU are the same to the bit whatever the width and the batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIER_OF,
)

import stars_kernels
from stars_kernels.hf.families import CLASSIFIERS
from stars_kernels.hf.view.layout import text_config
from stars_kernels.hf.view.rewrites.activation import Elementwise
from tests.hf import families

PROMPTS = [[1, 2, 3], list(range(40, 52)), [7]]
SET = dict(
    seed=0, reward_threshold=3.0, beta=1.0, max_new_tokens=5, segment_size=3, max_attempts=4, temperature=1.5,
    eos_token_id=(),
)  # fmt: skip
UNEVEN = dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_size", "embedding_dim"), 40)
"""Sizes at which a row is no whole number of torch's vectors, so that rows lie differently in them."""
EVEN = "bamba fuyu granitemoehybrid helium mamba2 persimmon phi zamba".split()
"""Their configurations take no such size beside the others of tests/hf/families.py. (Their MLPs are uneven.)"""

EQUAL = "equal"

PRODUCTS = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "_grouped_mm"), "matmul"),
    **dict.fromkeys(("convolution", "conv1d", "conv2d"), "convolution"),
    **dict.fromkeys(("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"), "attention"),
}
"""torch's sums of products, by what the table calls them: their order follows the shape of the whole batch."""
ELEMENTWISE = {"silu", "gelu", "sigmoid", "softplus", "mish", "elu", "celu", "selu", "hardswish", "hardsigmoid", "glu"}
"""torch's functions that round an element by its place in memory, where `Elementwise` does not hold them."""


@dataclass(frozen=True)
class Bits:
    """Of a family's answers: whether tokens and rewards were equal, and which of torch's ops could make them differ."""

    tokens: bool
    rewards: bool
    ops: tuple[str, ...]


def compiled() -> bool:
    return stars_kernels.backends()["packed_linear"]["cpu"] == "cpp"


def cell(family: str) -> str:
    """What the table says of a family; needs the compiled extension."""
    return ", ".join(measured(family).ops) or EQUAL


@functools.cache
def measured(family: str) -> Bits:
    """Decode with the family's own classifier as reward model where it has one, else with a head."""
    with patch.dict(families.GENERIC, {} if family in EVEN else UNEVEN):
        model = families.tiny(family).float()
        torch.manual_seed(1)
        own = CLASSIFIER_OF.get(family) in CLASSIFIERS
        rm = families.tiny_reward(family).float() if own else nn.Linear(text_config(model).hidden_size, 1)

    def answers(ids: list[int], **batch: Any) -> dict[int, tuple[Any, Any]]:
        outputs = stars_kernels.decode(model, rm, [PROMPTS[i] for i in ids], request_ids=ids, **SET, **batch)
        rewards = [[segment.rewards[: segment.attempts] for segment in output.segments] for output in outputs]
        return {i: (output.token_ids, reward) for i, output, reward in zip(ids, outputs, rewards, strict=True)}

    expected = answers([0, 1, 2], width=1, batch_size=1)
    assert max(len(row) for _, rewards in expected.values() for row in rewards) > 1
    with _Noting() as noting, patch.object(Elementwise, "forward", noting.unseen(Elementwise.forward)):
        others = [answers([0, 1, 2], width=3, wave=3)]
    others.append(answers([2, 0, 1], width=8, wave=2, batch_size=2))
    return Bits(
        tokens=all(found[i][0] == expected[i][0] for found in others for i in expected),
        rewards=all(found == expected for found in others),
        ops=tuple(sorted(noting.ops)),
    )


class _Noting(TorchDispatchMode):
    """Notes which of PRODUCTS and ELEMENTWISE run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()
        self.seen = True

    def unseen(self, function):
        """The same function, of which nothing is noted."""

        def call(*args):
            self.seen = False
            try:
                return function(*args)
            finally:
                self.seen = True

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.removesuffix("_")
        floats = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
        if self.seen and floats:
            if name in ELEMENTWISE and floats[0].numel() > 1:  # one element, of weights, lies in one place
                self.ops.add(name)
            elif name in PRODUCTS and not (name in ("matmul", "bmm") and floats[0].shape[-1] == 1):  # no sum: rotary
                self.ops.add(PRODUCTS[name])
        return func(*args, **kwargs or {})
