"""Models as users have them: with PEFT adapters, quantized, from a GGUF file, dispatched by accelerate, in half."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import stars_kernels
from stars_kernels.hf.view.copying import view_of
from stars_kernels.hf.view.rewrites import pack
from stars_kernels.hf.view.rewrites.packed import PackedLinear
from tests.hf.fork_check import check_decode, check_logits
from tests.tiny import VOCABULARY, byte_tokenizer, tiny_language_model, tiny_reward_model

SET = dict(seed=0, reward_threshold=1.0, beta=1.0, max_new_tokens=12, segment_size=4, request_ids=["a"])
TORCHAO = Path(sys.prefix) / "torchao"


def adapted(model, dtype=torch.float64, **settings):
    """`model` with random LoRA adapters, and a random head where PEFT makes one of its own."""
    torch.manual_seed(2)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_on_both_models(lm, dora):
    model = adapted(tiny_language_model(), task_type="CAUSAL_LM", use_dora=dora)
    reward = adapted(tiny_reward_model(), task_type="SEQ_CLS", use_dora=dora)
    check_logits(model.get_base_model())
    outputs = check_decode(model, reward)
    assert [o.token_ids for o in outputs] != [o.token_ids for o in check_decode(lm, reward)]
    assert [o.reward for o in outputs] != [o.reward for o in check_decode(model, tiny_reward_model())]


def test_adapters_on_packed_layers():
    models = [
        adapted(tiny_language_model(), torch.float32, task_type="CAUSAL_LM", use_dora=True),
        adapted(tiny_reward_model(), torch.float32, task_type="SEQ_CLS"),
    ]
    [packed], [plain] = (stars_kernels.decode(*models, [[1, 2, 3]], **SET, pack=pack) for pack in (True, False))
    assert packed.backends["linear"].startswith("cpp: packed")
    assert packed.token_ids == plain.token_ids and packed.reward == pytest.approx(plain.reward, abs=1e-4)


def test_a_trained_head_is_the_adapters_own():
    reward = adapted(tiny_reward_model(), task_type="SEQ_CLS")
    [output] = stars_kernels.decode(tiny_language_model(), reward, [[1, 2, 3]], **SET)
    ids = torch.tensor([[1, 2, 3, *output.token_ids]])
    own = reward(ids).logits.item()
    with reward.disable_adapter():
        bare = reward(ids).logits.item()
    assert output.reward == pytest.approx(own, abs=1e-6) != pytest.approx(bare, abs=1e-2)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused(rm, kind):
    model = get_peft_model(tiny_language_model(), kind(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(
        ValueError, match=r"model is a PEFT model with P.*, which puts virtual tokens before the prompt"
    ):
        stars_kernels.decode(model, rm, [1], **SET)


def test_a_head_that_is_not_linear_is_refused(lm):
    reward = tiny_reward_model()
    reward.score = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)).double()
    with pytest.raises(ValueError, match=r"has a torch.nn.*Sequential as its head, expected a torch.nn.Linear"):
        stars_kernels.decode(lm, reward, [1], **SET)


def test_a_head_with_a_bias(lm):
    reward = tiny_reward_model()
    reward.score.bias = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    check_decode(lm, reward)


def dispatched(model, place, folder):
    """`model` as device_map= leaves it, its second layer in `place`."""
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": place}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def test_a_dispatched_model(tmp_path):
    model = dispatched(tiny_language_model(), "cpu", tmp_path)
    for module in view_of(model).modules():  # accelerate binds a module's forward to the module itself
        if "forward" in vars(module):
            assert module.forward.args[0] is module._old_forward.__self__ is module
    check_logits(model)
    check_decode(model)


def test_offloaded_weights_are_refused(tmp_path, rm):
    with pytest.raises(ValueError, match=r"lies on \['cpu', 'meta'\], expected .* 'meta' is where weights stand that"):
        stars_kernels.decode(dispatched(tiny_language_model(), "disk", tmp_path), rm, [1], **SET)


def write_gguf(file):
    """A tiny random Llama as llama.cpp writes it."""
    gguf = pytest.importorskip("gguf")
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(160)
    writer.add_embedding_length(24)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(3)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(VOCABULARY)
    writer.add_eos_token_id(257)
    shapes = {"token_embd": (VOCABULARY, 24), "output_norm": (24,), "output": (VOCABULARY, 24)}
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (24,), "ffn_norm": (24,), "attn_q": (24, 24), "attn_k": (8, 24), "attn_v": (8, 24),
                "attn_output": (24, 24), "ffn_gate": (48, 24), "ffn_up": (48, 24), "ffn_down": (24, 48),
            }.items()
        }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (0.4 * random.standard_normal(shape)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_without_its_package(tmp_path, rm, monkeypatch):
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setattr(stars_kernels.hf.loading.language_model, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"tiny.gguf' needs the package gguf, .*: pip install 'stars-kernels\[gguf\]'"
    ):
        stars_kernels.decode(tmp_path / "tiny.gguf", rm, "a")


def test_a_gguf_file(tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float64)
    check_logits(model)
    check_decode(model)
    rm = tiny_reward_model(torch.float32)
    settings = dict(tokenizer=byte_tokenizer(), **SET)
    [loaded], [given] = (
        stars_kernels.decode(lm, rm, [[1, 2, 3]], **settings) for lm in (str(file), model.to(torch.float32))
    )
    assert loaded.token_ids == given.token_ids and loaded.reward == given.reward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """Rewards of the answers are those of the models' own forward, within the type's rounding."""
    lm, rm = tiny_language_model(dtype), tiny_reward_model(dtype)
    outputs = stars_kernels.decode(lm, rm, [[1, 2, 3], [40]], **{**SET, "request_ids": ["a", "b"]})
    exact = tiny_reward_model()
    for prompt, output in zip([[1, 2, 3], [40]], outputs, strict=True):
        ids = torch.tensor([prompt + output.token_ids])
        slack = 4 * (rm(ids).logits - exact(ids).logits).abs().item() + 100 * torch.finfo(dtype).eps
        assert output.reward == pytest.approx(exact(ids).logits.item(), abs=slack)


def test_quantized_weights():
    """torchao lies in a folder of its own, as transformers imports it wherever it finds it."""
    if not TORCHAO.is_dir():
        pytest.skip("torchao is not beside the environment (`make build` puts it there)")
    path = os.pathsep.join([str(TORCHAO), str(Path(__file__).parents[3])])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.hf.loading.quantized"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["linear", "torch", "widths", "equal", "reward", "equal"]


def test_packing_leaves_other_tensors_alone():
    class Marked(torch.Tensor):
        """A weight that is more than its numbers, as a quantized one is."""

    lm = tiny_language_model(torch.float32)
    lm.lm_head.weight = nn.Parameter(lm.lm_head.weight.detach().as_subclass(Marked), requires_grad=False)
    view = view_of(lm)
    pack(view)
    assert type(view.lm_head) is nn.Linear and view.lm_head.weight is lm.lm_head.weight
    assert any(isinstance(module, PackedLinear) for module in view.modules())
