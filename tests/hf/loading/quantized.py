"""Run by test_loading.py where torchao can be imported: decoding with torchao's 8-bit weights."""

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import stars_kernels
from stars_kernels.hf.view.copying import view_of
from stars_kernels.hf.view.rewrites import pack
from tests.tiny import tiny_language_model, tiny_reward_model

torch.set_num_threads(1)
lm, rm = tiny_language_model(torch.float32), tiny_reward_model(torch.float32)
for model in (lm, rm):
    quantize_(model, Int8WeightOnlyConfig())
    assert type(model.model.layers[0].mlp.up_proj.weight).__module__.startswith("torchao")
view = view_of(lm)
assert pack(view) == 0, "a quantized weight was packed"
assert view.lm_head.weight is lm.lm_head.weight, "a quantized weight was copied"

settings = dict(seed=0, reward_threshold=1.0, beta=1.0, max_new_tokens=12, segment_size=4, request_ids=["a"])
outputs = [stars_kernels.decode(lm, rm, [[1, 2, 3]], width=width, **settings)[0] for width in (1, 3)]
print("linear", outputs[0].backends["linear"])
assert outputs[0].token_ids == outputs[1].token_ids
print("widths equal")
own = rm(torch.tensor([[1, 2, 3, *outputs[0].token_ids]])).logits.item()
assert abs(own - outputs[0].reward) < 1e-4, (own, outputs[0].reward)
print("reward equal")
