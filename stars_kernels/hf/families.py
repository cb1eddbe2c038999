"""Which classes of transformers the engine takes as a language model, and which it refuses and why.

A class is in WORKS because tests built a tiny random model of it and compared, in float64, its logits through the fork
cache with its own, and decoded answers with the plain sequential loop's.
"""

from __future__ import annotations

HOOK = "hook"
"""Attention goes through transformers' interface: prefixes are read where they lie."""
GATHERED = "gathered"
"""Attention has no hook: each layer gets copies of whole rows."""
STATES = "states"
"""As HOOK, and conv or recurrent states are copied for each row."""
STEPS = "steps"
"""As STATES, but transformers itself is wrong for several tokens behind a state: as a language model only."""

WORKS: dict[str, str] = {
    "BloomForCausalLM": GATHERED,
    "Cohere2ForCausalLM": HOOK,
    "DeepseekV3ForCausalLM": HOOK,
    "FalconForCausalLM": GATHERED,
    "GPT2LMHeadModel": HOOK,
    "GPTJForCausalLM": GATHERED,
    "GPTNeoForCausalLM": GATHERED,
    "GPTNeoXForCausalLM": HOOK,
    "Gemma2ForCausalLM": HOOK,
    "Gemma3ForCausalLM": HOOK,
    "Gemma3nForCausalLM": HOOK,
    "GptOssForCausalLM": HOOK,
    "GraniteForCausalLM": HOOK,
    "Lfm2ForCausalLM": STATES,
    "LlamaForCausalLM": HOOK,
    "MambaForCausalLM": STEPS,
    "MistralForCausalLM": HOOK,
    "MixtralForCausalLM": HOOK,
    "MptForCausalLM": GATHERED,
    "OPTForCausalLM": HOOK,
    "Phi3ForCausalLM": HOOK,
    "Qwen2ForCausalLM": HOOK,
    "Qwen3ForCausalLM": HOOK,
    "Qwen3MoeForCausalLM": HOOK,
    "Qwen3NextForCausalLM": STATES,
    "StableLmForCausalLM": HOOK,
}  # fmt: skip

CLASSIFIERS: set[str] = {
    "LlamaForSequenceClassification",
}  # fmt: skip
"""Causal sequence classifiers on such models: their rewards are tested equal to the plain forward's."""

REFUSED: dict[str, str] = {}
