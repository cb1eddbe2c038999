"""Tiny random Llama models in float64, and a tokenizer over bytes."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

VOCABULARY = 260
BOS, EOS = 256, 257


def tiny_config(**changes):
    settings = dict(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=160, initializer_range=0.4, num_labels=1,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=None,
    )  # fmt: skip
    return LlamaConfig(**{**settings, **changes})


def tiny_language_model(dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(**changes)).to(dtype).eval()


def tiny_reward_model(dtype=torch.float64, seed=1, **changes):
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(tiny_config(**changes)).to(dtype).eval()


def byte_tokenizer(chat_template=None):
    """One token a byte (ids 0..255 in GPT-2's alphabet order), BOS 256 and EOS 257; no pad token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    assert (fast.bos_token_id, fast.eos_token_id) == (BOS, EOS)
    fast.chat_template = chat_template
    return fast
