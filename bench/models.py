"""The models and prompts of the benchmarks."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from stars_kernels import Engine

MODELS = ("smol", "tiny")
PROMPT_TOKENS = 200
TEXT = (
    "The harbour town woke slowly that morning. Fog lay over the quay, and the fishing boats knocked "
    "against their ropes as if impatient to leave. Old Marten, who had kept the lighthouse for thirty "
    "years, walked down the hill with a letter in his coat. He had read it four times and still could not "
    "decide whether it was good news or bad. In the bakery the lamps were lit, and somebody was laughing. "
    "A girl with a violin case asked him the way to the station, and he pointed with his stick without a "
    "word. The train, she said, would bring her brother home after seven years. He nodded, thought of his "
    "own brother, and for the first time that week the weight of the letter seemed to lift."
)


@dataclass
class Models:
    model: LlamaForCausalLM
    rm: PreTrainedModel
    prompts: list[list[int]]
    """Token ids, all of one length and all different."""

    @cached_property
    def engine(self) -> Engine:
        """Load and pack the models for all calls, at the first use of this."""
        return Engine(self.model, self.rm, prefix_cache=0)  # a call reads its prompts, whatever was read before


def load(
    name: str,
    prompts: int,
    dtype: torch.dtype = torch.float32,
    prompt_tokens: int = PROMPT_TOKENS,
    device: str = "cpu",
) -> Models:
    """Load `smol`, the demo's language model, or `tiny`, a random one of two layers; the reward model is as deep."""
    words = TEXT.split()
    repeats = 3 + prompt_tokens // len(words)
    texts = [" ".join(words[7 * p :] + words * repeats) for p in range(prompts)]  # each starts at another word
    if name == "smol":
        from demo.models import load_language_model  # what it needs, `tiny` does not

        model, tokenizer = load_language_model(dtype)
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    else:
        model = _tiny_language_model().to(dtype)
        ids = [list(text.encode()) for text in texts]
    model = model.to(device)
    return Models(model, reward_model(model), [one[:prompt_tokens] for one in ids])


def reward_model(model: PreTrainedModel) -> PreTrainedModel:
    """Make a reward model of the language model's own layers and weights under a fixed random head."""
    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, None
    with torch.device("meta"):
        rm = AutoModelForSequenceClassification.from_config(config)
    shared = itertools.chain(model.parameters(), model.buffers())
    rm.model = copy.deepcopy(model.model, memo={id(tensor): tensor for tensor in shared})
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(1, config.hidden_size, generator=generator) / config.hidden_size**0.5
    rm.score.weight = torch.nn.Parameter(head.to(model.device, model.dtype))
    rm.score.weight._is_hf_initialized = True  # transformers' mark; without it, a head that a checkpoint had not
    return rm.eval()


def _tiny_language_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
        initializer_range=0.2,  # logits far enough from flat for the filters to matter
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()
