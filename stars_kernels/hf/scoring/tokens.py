"""A causal language model as a reward model: what it makes of chosen next tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stars_kernels.hf.loading.language_model import name_of
from stars_kernels.hf.modes import without_autocast
from stars_kernels.hf.scoring.reader import Values
from stars_kernels.hf.view.copying import eval_copy
from stars_kernels.hf.view.layout import vocabulary

Token = str | int


def token_values(layer: nn.Linear, ids: list[int]) -> Values:
    """Of one token its logit; of several the softmax probability, among them, of the first.

    hidden [..., D] -> [...] float64. layer: the output layer; ids: rows of it.
    """
    weight = layer.weight[ids]  # [K, D]
    bias = None if layer.bias is None else layer.bias[ids]

    def values(hidden: Tensor) -> Tensor:
        logits = nn.functional.linear(hidden.to(weight.device), weight, bias).double()
        return logits[..., 0] if len(ids) == 1 else logits.softmax(dim=-1)[..., 0]

    return values


def token_ids(tokens: tuple[Token, ...], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of tokens, each given as its text, which must be one token, or as its id."""
    ids, size = list[int](), vocabulary(model)
    for token in tokens:
        found = [token] if isinstance(token, int) else list(tokenizer(token, add_special_tokens=False)["input_ids"])
        if len(found) != 1:
            raise ValueError(
                f"{token!r} of tokens is {len(found)} tokens {found} of reward_model {name_of(model)}, expected one"
            )
        if not 0 <= found[0] < size:
            raise ValueError(
                f"{token!r} of tokens is outside the vocabulary of reward_model {name_of(model)}, expected 0 to "
                f"{size - 1}"
            )
        ids += found
    return ids


@torch.inference_mode()
@without_autocast()
def output_layer(model: PreTrainedModel) -> nn.Linear:
    """Return the layer whose outputs are the model's logits; an error where more is done to them or to the states.

    A forward shows it, in which the layer's output is replaced by numbers that a scale or a soft cap would change.
    """
    copy = eval_copy(model)
    layer, seen = copy.get_output_embeddings(), list[Tensor]()
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter:
        raise ValueError(
            f"reward_model {name_of(model)} has a {type(layer).__name__} as its output layer, expected a "
            "torch.nn.Linear with plain weights under tokens="
        )

    def numbers(_: nn.Module, given: Any, output: Tensor) -> Tensor:
        seen.append(given[0])
        return torch.linspace(-100, 100, output.shape[-1]).to(output).expand_as(output)

    layer.register_forward_hook(numbers)
    one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    logits, states = copy(input_ids=one).logits, copy.base_model(input_ids=one).last_hidden_state
    plain = torch.equal(logits.to(states.dtype), numbers(layer, (states,), logits.to(states.dtype)))
    if not plain or not torch.allclose(seen[0].to(states), states):
        raise ValueError(
            f"reward_model {name_of(model)} changes its logits or its states at the output layer (a scale or a soft "
            "cap), expected plain logits under tokens="
        )
    own = model.get_output_embeddings()
    assert isinstance(own, nn.Linear)
    return own


def check_tokens(tokens: object) -> None:
    if tokens is None:
        return
    given = tokens if isinstance(tokens, tuple) else ()
    if not given or not all(isinstance(t, str | int) and not isinstance(t, bool) and t != "" for t in given):
        raise TypeError(f"tokens is {tokens!r}, expected a tuple of tokens, each its text or its id")
