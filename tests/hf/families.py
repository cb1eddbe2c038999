"""A tiny random model in float64 for every causal language model family of transformers."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.tiny import BOS, EOS, VOCABULARY

PAD = 259
WINDOW = 5

GENERIC: dict[str, Any] = {
    # tokens
    "vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None,
    "decoder_start_token_id": BOS, "forced_eos_token_id": None, "tie_word_embeddings": False, "type_vocab_size": 2,
    # width and depth
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "emb_dim": 32, "embedding_size": 32, "embedding_dim": 32,
    "intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_inner": 48,
    "shared_intermediate_size": 16, "ffn_dim": 48, "ffn_hidden_size": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "dff": 48, "dim_ff": 48, "d_inner": 48, "expert_ffn_hidden_size": 16,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 2,
    # attention
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "attention_heads": 4, "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "dim_head": 8,
    "d_head": 8, "kv_channels": 8, "rotary_dim": 4,
    "sliding_window": WINDOW, "sliding_window_size": WINDOW, "window_size": WINDOW, "local_attention": 2 * WINDOW,
    "use_sliding_window": True, "max_window_layers": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "index_topk": 3, "index_head_dim": 8, "index_n_heads": 2,
    # positions
    "max_position_embeddings": 160, "n_positions": 160, "max_seq_len": 160, "n_ctx": 160, "context_length": 160,
    "max_target_positions": 160, "model_max_length": 160,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_expert_group": 1, "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # states
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "state_size": 8, "mamba_dt_rank": 4, "time_step_rank": 4,
    "mamba_chunk_size": 4, "chunk_size": 4, "mamba_d_ssm": 64,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4,
    # spread and dropout
    "initializer_range": 0.4, "init_std": 0.4, "embed_init_std": 0.4,
    "is_decoder": True,
}  # fmt: skip
"""What every configuration is made of: each takes those of these attributes that it has."""

SLIDING_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR_FULL = {"layer_types": ["linear_attention", "full_attention"]}
SOFT_CAPS = {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
ROBERTA = {"pad_token_id": 1, "max_position_embeddings": 170}
SHARED_KEYS = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": 2 * SLIDING_FULL["layer_types"]}
GEMMA3N = {
    **SHARED_KEYS, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
    "altup_num_inputs": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "final_logit_softcapping": 5.0,
}  # fmt: skip
GEMMA4 = {
    **SHARED_KEYS, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_experts": None,
    "global_head_dim": 16, "moe_intermediate_size": None,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": SLIDING_FULL,
    "bailing_hybrid": LINEAR_FULL,
    "bamba": {"attn_layer_indices": [1]},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 32, "encoder_hash_byte_group_size": [3]},
    "camembert": ROBERTA,
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5, **SLIDING_FULL},
    "cohere2_moe": {"logit_scale": 0.5, **SLIDING_FULL},
    "cohere_compass_text": {
        **SLIDING_FULL, "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                                            "full_attention": None},
    },
    "cpmant": {"prompt_length": 4},
    "data2vec-text": ROBERTA,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 4.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "num_hidden_layers": 3, "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
        "o_groups": 2, "o_lora_rank": 8,
    },
    "doge": {"keep_window_size": WINDOW},
    "dots3_note_text": {"num_key_value_heads": 4, "layer_types": ["indexed_attention", "sliding_attention"],
                        "per_layer_config": {}, "head_dim": 12, "shared_experts_intermediate_size": 16},
    "emu3_text_model": {"pad_token_id": PAD},
    "exaone4": SLIDING_FULL,
    "exaone_moe": SLIDING_FULL,
    "flint": {"layer_types": ["full_attention", "sliding_attention"], "mlp_only_layers": [0]},
    "gemma2": SOFT_CAPS,
    "gemma3_text": {**SOFT_CAPS, **SLIDING_FULL, "attn_logit_softcapping": None},
    "gemma3n_text": GEMMA3N,
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": {**SHARED_KEYS, "global_head_dim": 16},
    "gemma4_assistant": {"backbone_hidden_size": 32},
    "gemma4_unified": {"vision_config": None, "audio_config": None},
    "gemma4_unified_assistant": {"backbone_hidden_size": 32},
    "git": {"vision_config": {**VISION, "image_size": 8, "patch_size": 4}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_swa": {"attention_multiplier": 0.3},
    "granitemoehybrid": LINEAR_FULL,
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"], "swa_num_attention_heads": 4,
                     "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4, "rel_extent": 16},
    "inkling2_text": {"layer_types": ["hybrid_sliding", "hybrid"], "swa_num_attention_heads": 4,
                      "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4, "rel_extent": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**LINEAR_FULL, "q_lora_rank": None},
    "kolibri1": SLIDING_FULL,
    "laguna": SLIDING_FULL,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"]},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
                    "attention_chunk_size": WINDOW, "floor_scale": 4, "intermediate_size_mlp": 48},
    "mamba2": {"num_heads": 8},
    "mellum": SLIDING_FULL,
    "mimo_v2_flash": {"v_head_dim": 4},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_block_size": 2,
                           "index_topk_blocks": 1},
    "ministral3": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32.0,
                                       "beta_slow": 1.0, "original_max_position_embeddings": 4,
                                       "llama_4_scaling_beta": 0.1}},
    "minimax": {"layer_types": ["full_attention", "linear_attention"], "block_size": 4},
    "modernbert-decoder": {"pad_token_id": PAD, **SLIDING_FULL},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2,
                   "moe_shared_expert_intermediate_size": 16},
    "olmo3": SLIDING_FULL,
    "prophetnet": {"pad_token_id": 0},
    "qwen3_5_moe_text": LINEAR_FULL,
    "qwen3_5_text": LINEAR_FULL,
    "qwen3_next": LINEAR_FULL,
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2,
                       "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4, "indexer_compress_ratio": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": WINDOW},
    "reformer": {"axial_pos_shape": [8, 20], "axial_pos_embds_dim": [16, 16], "feed_forward_size": 48,
                 "attention_head_size": 8, "attn_layers": ["local", "lsh"]},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roberta": ROBERTA,
    "roberta-prelayernorm": ROBERTA,
    "roc_bert": {"shape_vocab_size": 16, "pronunciation_vocab_size": 16, "shape_embed_dim": 8,
                 "pronunciation_embed_dim": 8},
    "smollm3": {"layer_types": ["sliding_attention", "full_attention"], "no_rope_layers": [1, 0]},
    "vaultgemma": SOFT_CAPS,
    "xglm": {"pad_token_id": 1},
    "xlm": {"pad_token_id": 2},
    "xlm-roberta": ROBERTA,
    "xlm-roberta-xl": ROBERTA,
    "xmod": {**ROBERTA, "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"], "attention_head_dim": 16,
              "attention_hidden_size": 64, "num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"], "router_hidden_size": 8},
}  # fmt: skip
"""What a family needs beyond them."""


PARTS: dict[str, dict[str, str]] = {
    "emu3": {"text_config": "emu3_text_model"},
    "dots3_note": {"text_config": "dots3_note_text"},
    "fuyu": {"text_config": "persimmon"},
    "gemma3": {"text_config": "gemma3_text", "vision_config": "siglip_vision_model"},
    "gemma3n": {"text_config": "gemma3n_text"},
    "gemma4": {"text_config": "gemma4_text"},
    "gemma4_assistant": {"text_config": "gemma4_text"},
    "gemma4_unified": {"text_config": "gemma4_unified_text"},
    "gemma4_unified_assistant": {"text_config": "gemma4_unified_text"},
    "got_ocr2": {"text_config": "qwen2"},
    "llama4": {"text_config": "llama4_text"},
    "moss_transcribe_diarize": {"text_config": "qwen3"},
    "musicgen": {"text_encoder": "t5", "audio_encoder": "encodec"},
    "musicgen_melody": {"text_encoder": "t5", "audio_encoder": "encodec"},
    "qwen3_5": {"text_config": "qwen3_5_text"},
    "qwen3_5_moe": {"text_config": "qwen3_5_moe_text"},
    "qwen4_exp": {"text_config": "qwen4_exp_text"},
}
"""The families of a composed configuration's parts, where they have overrides or are not given by its class."""


INNER: dict[str, dict[str, Any]] = {
    "gemma4": {"pad_token_id": PAD},
    "gemma4_unified": {"pad_token_id": PAD},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
}
"""What these parts need beyond their own overrides."""


FLOAT32 = ("xglm",)
"""Their own forward fails in float64."""
WRONG_IN_TRANSFORMERS = {
    "falcon_mamba": ("chunk",), "jamba": ("chunk",), "mamba": ("chunk",), "moshi": ("step", "chunk"),
    "nemotron_h": ("step",), "recurrent_gemma": ("chunk",), "zamba": ("chunk",), "zamba2": ("step",),
}  # fmt: skip
"""Where a model's forwards with transformers' own DynamicCache differ from its forward without: those of one token
("step"), or of several behind others ("chunk"). Moshi's masks are full, but its DynamicCache keeps a window alone."""
FLOAT32_PARTS = """
    afmoe axk1 beam bloom codegen deepseek_v2 deepseek_v3 dots1 ernie4_5_moe exaone_moe flint gemma2 glm4_moe
    glm4_moe_lite gpt_neo gptj granite_swa granitemoe_swa hy_v3 kolibri1 laguna longcat_flash mimo_v2_flash minimax_m2
    mllama mpt solar_open vaultgemma xglm
""".split()
"""A softmax, a router or the logits are computed in float32, whatever the model's dtype."""
FLOAT32_SCANS = """
    bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear mamba mamba2 nemotron_h olmo_hybrid
    qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next zamba zamba2
""".split()
"""A recurrence over all tokens is."""
UNBUILT = {
    "dots3_note": "its configuration takes no other depth; its class is built as dots3_note_text",
    "gemma3n": "its vision tower needs the packages timm and pillow",
    "gemma4_assistant": "its configuration fits the layers of a published model alone",
}
"""Refused families of which no tiny model can be built here."""
CAUSE: dict[str, dict[str, Any]] = {
    "big_bird": {"is_decoder": False}, "megatron-bert": {"is_decoder": False}, "rembert": {"is_decoder": False},
}  # fmt: skip
"""Settings that show why a family is refused which would work with its others."""


def tolerance(family: str) -> float:
    """Of logits and rewards relative to the largest: what the family's own arithmetic allows."""
    return 2e-5 if family in FLOAT32_SCANS else 5e-6 if family in FLOAT32_PARTS else 1e-12


def filled(kind: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A configuration with the generic settings that it has, those of its parts included, and `changes`."""
    known = inspect.signature(kind).parameters
    settings = {name: value for name, value in GENERIC.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention: every head has keys of its own, and head_dim is what is rotated
        settings |= {"head_dim": 4, "num_key_value_heads": 4}
    parts = {name: part for name, part in kind.sub_configs.items() if name in known and name not in changes}
    settings |= {name: filled(part) for name, part in parts.items() if part is not AutoConfig}
    return kind(**settings | copy.deepcopy(changes))


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    settings = OVERRIDES.get(model_type, {}) | changes
    inner = INNER.get(model_type, {})
    parts = {name: tiny_config(part, **inner) for name, part in PARTS.get(model_type, {}).items()}
    return filled(CONFIG_MAPPING[model_type], **parts | settings)


def randomized(model: nn.Module) -> nn.Module:
    """Every parameter a little off its first value, so that no norm, bias, sink or gate is without effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


SINCE = {"cohere_compass_text": "5.23", "moshi": "5.20"}
"""The first release of transformers known to work: older ones fail to build a tiny model, or pass it no cache."""


def finished(model):
    dtype = torch.float32 if model.config.model_type in FLOAT32 else torch.float64
    model = randomized(model.to(dtype)).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the default has no float64
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # "sdpa", the default of older transformers, leaves the cap out
    return model


def tiny(model_type: str, seed: int = 0, **changes: Any):
    torch.manual_seed(seed)
    config = tiny_config(model_type, **changes)
    if model_type.startswith("musicgen"):  # its mapped class takes the decoder's part
        return finished(getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(config.decoder))
    return finished(AutoModelForCausalLM.from_config(config))


def tiny_reward(model_type: str, seed: int = 1):
    torch.manual_seed(seed)
    return finished(AutoModelForSequenceClassification.from_config(tiny_config(model_type, num_labels=1)))


def refused(model_type: str):
    """A model of a refused family: a tiny one, or where none can be built an empty object of its class."""
    if model_type in UNBUILT:
        kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
        return kind.__new__(kind)
    return tiny(model_type)
