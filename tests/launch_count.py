"""What a forward of the engine launches, by op, counted on a tiny Llama."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from stars_kernels.hf.view.copying import view_of


class Launches(TorchDispatchMode):
    """Within it, ops are counted in `seen` by name; no views, no empty tensors."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name
        if not (isinstance(out, torch.Tensor) and function.is_view) and not name.startswith(
            ("aten::empty", "aten::new_empty", "aten::unbind", "aten::_unsafe")
        ):
            self.seen[name.split("::")[1].rstrip("_")] += 1
        return out


def llama_view(layers):
    """A view of a Llama of so many layers in bf16."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return view_of(LlamaForCausalLM(config).bfloat16())
