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


def byte_tokenizer(chat_template=None, reverse=False, merges=()):
    """One token a byte (ids 0..255 in GPT-2's alphabet order), BOS 256 and EOS 257; no pad token.

    reverse: the same tokens under other ids. merges: pairs of tokens that become one token each, from id 256 on, which
    moves BOS and EOS behind them.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    names = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    assert (fast.bos_token_id, fast.eos_token_id) == (BOS + len(merges), EOS + len(merges))
    fast.chat_template = chat_template
    return fast


def scripted_model(script):
    """A Llama that does nothing but look up the next token from the last one."""
    model = tiny_language_model(hidden_size=260, num_hidden_layers=1, num_attention_heads=10)
    following = {answer[-1]: token for answer, token in script.items() if answer}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_() if "norm" not in name else parameter.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(260))
        head = torch.zeros(260, 260, dtype=torch.float64)
        head[script[()]] = 10.0  # the default, overruled below
        for last, token in following.items():
            head[:, last] = 0.0
            head[token, last] = 10.0
        model.lm_head.weight.copy_(head)
    return model


def text_model(text, tokenizer):
    """Writes `text`, whose characters are distinct, after any prompt; then repeats its last character."""
    ids = tokenizer(text)["input_ids"]
    assert len(set(ids)) == len(ids)
    return scripted_model({tuple(ids[:i]): ids[i] for i in range(len(ids))})


def spelling_model(letters, end=True, seed=0, **changes):
    """A language model that writes the bytes of `letters` and (if `end`) the EOS alone: pairs that merge are common."""
    model = tiny_language_model(seed=seed, **changes)
    allowed = {*byte_tokenizer()(letters)["input_ids"], *([EOS] if end else [])}
    barred = torch.tensor([i not in allowed for i in range(VOCABULARY)])

    def bar(module, args, output):
        output.logits[..., barred.to(output.logits.device)] = -torch.inf

    model.register_forward_hook(bar)
    return model
