"""Published reward models whose form transformers does not know: by hub name or by their config's class."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from stars_kernels.hf.families import CLASSIFIERS
from stars_kernels.hf.loading.heads import Gated
from stars_kernels.hf.loading.language_model import reading
from stars_kernels.hf.loading.reward_model import ENCODERS, PROCESS_MODELS

Settings = dict[str, Any]
"""Arguments of a `RewardModel`."""
LLAMA_TURN = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
"""What closes the prompt in the text of a Llama 3 chat."""
HOW = "head=, for another head, or tokens=, for logits of a causal language model"


class ArmoHead(Gated):
    """ArmoRM's head (arXiv 2406.12845), with the names of its checkpoint.

    The reward is gate(prompt) . (regression(last) @ transform): objectives freed of what they share with verbosity.
    """

    prompt_end = LLAMA_TURN

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        size, count = config["hidden_size"], config["num_objectives"]
        self.regression_layer = nn.Linear(size, count, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(count))
        self.gating = _Gating(
            [size, *[config.get("gating_hidden_dim", 1024)] * config.get("gating_n_hidden", 3), count],
            float(config.get("gating_temperature", 10)),
        )

    def objectives(self, hidden: Tensor) -> Tensor:
        """[R, D] -> [R, K]."""
        rewards: Tensor = self.regression_layer(hidden) @ self.reward_transform_matrix
        return rewards

    def gate(self, hidden: Tensor) -> Tensor:
        """[R, D] -> [R, K]."""
        weights: Tensor = self.gating(hidden)
        return weights


class _Gating(nn.Module):
    """A softmax at a temperature over the outputs of linear layers with a ReLU between each two, times a scale."""

    def __init__(self, sizes: Sequence[int], temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            hidden = layer(hidden).relu()
        weights: Tensor = (self.layers[-1](hidden) / self.temperature).softmax(dim=-1) * self.logit_scale
        return weights


def question_and_answer(prompt: Any, answer: str) -> str:
    """The question as it was asked, a space and the answer; of a chat, its last message."""
    return f"{prompt if isinstance(prompt, str) else prompt[-1]['content']} {answer}"


BY_NAME: dict[str, Settings] = {
    "peiyi9979/math-shepherd-mistral-7b-prm": dict(
        tokens=("+", "-"), template=question_and_answer, step="\n", mark=" ки", between="\n"
    ),
    "nvidia/Llama-3.1-Nemotron-70B-Reward-HF": dict(tokens=(0,)),
}
"""Causal language models, which their config does not tell from others."""
BY_CLASS: dict[str, Callable[[Mapping[str, Any]], Settings]] = {
    "INFORMForSequenceClassification": lambda config: dict(head="score"),
    "Qwen2ForRewardModel": lambda config: dict(head="score"),
    "Qwen2ForProcessRewardModel": lambda config: dict(head="score", label=1, step="\n\n", mark="<extra_0>"),
    "LlamaForRewardModelWithGating": lambda config: dict(head=("", ArmoHead(config))),
    "LlamaRewardModel": lambda config: dict(head="regression_head"),
    "EurusRewardModel": lambda config: dict(head="regression_head"),
    "LlamaForScore": lambda config: dict(head="score_head"),
    "LlamaModelForScore": lambda config: dict(head="score_head"),
}


def preset(name: str | os.PathLike[str]) -> Settings:
    """Return how a published reward model is read, by its hub name or its config; an error for an unknown form."""
    path = os.path.expanduser(name)
    with reading("reward_model", path):
        config, _ = PreTrainedConfig.get_config_dict(path)
    kind = (config.get("architectures") or ["no class"])[0]
    if path in BY_NAME:
        return BY_NAME[path]
    if kind in BY_CLASS:
        return BY_CLASS[kind](config)
    if "vhead_layer_type" in config:  # GRM's, whose class is that of the language model
        return dict(head="v_head")
    if kind in {*CLASSIFIERS, *PROCESS_MODELS, *ENCODERS}:
        return {}
    raise ValueError(
        f"reward_model {path!r} is a {kind} of model_type {config.get('model_type')!r}, which no preset knows; "
        f"expected one of {', '.join([*BY_NAME, *BY_CLASS])}, a tested classifier of transformers, or RewardModel(...) "
        f"with {HOW}"
    )
