"""Packed linears: the same numbers up to rounding, only on the view, one copy, never stale, never in silence."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN
from transformers.pytorch_utils import Conv1D

import stars_kernels
from stars_kernels.hf.cache import open_cache
from stars_kernels.hf.view.copying import view_of
from stars_kernels.hf.view.rewrites import pack
from stars_kernels.hf.view.rewrites import packed as packing
from stars_kernels.hf.view.rewrites.activation import Elementwise
from stars_kernels.hf.view.rewrites.norm import RMSNorm
from stars_kernels.hf.view.rewrites.packed import PackedLinear, PackedMLP
from tests.hf import families
from tests.tiny import tiny_language_model, tiny_reward_model

SET = dict(seed=0, reward_threshold=1.0, beta=1.0, max_new_tokens=12, segment_size=4)
WIDE = dict(hidden_size=96, intermediate_size=160, num_attention_heads=12, num_key_value_heads=12)


def wide_model(dtype=torch.float32):
    return tiny_language_model(dtype, **WIDE)


@torch.no_grad()
def test_equal_up_to_rounding_and_only_on_the_view():
    model = wide_model()
    view = view_of(model)
    size = pack(view)
    assert not [m for m in view.modules() if type(m) is nn.Linear], "one was left as it is"
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    outputs = {m.out_features for m in linears}
    assert {n % 16 for n in outputs} != {0}, "one layer is padded"
    assert size == sum(-(-m.out_features // 16) * 16 * m.in_features * 4 for m in linears)
    assert size == 2 * pack(view_of(model), torch.bfloat16)
    ids = torch.arange(20)[None]
    view.set_attn_implementation("sdpa")
    torch.testing.assert_close(view(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_every_number_of_rows(bias):
    linear = nn.Linear(96, 130, bias=bias)
    packed = PackedLinear(linear, torch.float32)
    for rows in (0, 1, 3, 8, 33):
        x = torch.randn(rows, 2, 96)
        torch.testing.assert_close(packed(x), linear(x), rtol=1e-5, atol=1e-5)


def test_one_copy_that_follows_its_weight():
    linear = nn.Linear(96, 96)
    first = PackedLinear(linear, torch.float32)
    assert PackedLinear(linear, torch.float32).packed is first.packed
    with torch.no_grad():
        linear.weight.mul_(2)
    again = PackedLinear(linear, torch.float32)
    assert again.packed is not first.packed
    x = torch.randn(4, 96)
    torch.testing.assert_close(again(x), linear(x), rtol=1e-5, atol=1e-5)
    before = len(packing._packed)
    del linear
    assert len(packing._packed) == before - 1


def test_the_output_says_what_ran():
    model, rm = wide_model(), tiny_reward_model(torch.float32, **WIDE)
    packed = stars_kernels.decode(model, rm, [1, 2], **SET)
    assert packed.backends["linear"].startswith("cpp: packed, ")
    plain = stars_kernels.decode(model, rm, [1, 2], pack=False, **SET)
    assert plain.backends["linear"] == "torch"
    assert not {"packed_linear", "packed_swiglu", "content_hash"} & {*packed.backends, *plain.backends}
    assert packed.reward == pytest.approx(plain.reward, abs=1e-3)
    for dtype in (torch.float64, torch.bfloat16):
        other = stars_kernels.decode(wide_model(dtype), tiny_reward_model(dtype, **WIDE), [1, 2], **SET)
        assert other.backends["linear"] == "torch"
    with stars_kernels.reference():
        assert stars_kernels.decode(model, rm, [1, 2], **SET).backends["linear"] == "torch"


def test_bfloat16_on_request():
    model, rm = wide_model(), tiny_reward_model(torch.float32, **WIDE)
    output = stars_kernels.decode(model, rm, [1, 2], pack="bfloat16", **SET)
    assert output.config.pack == "bfloat16" and output.backends["linear"].startswith("cpp: packed, ")
    with pytest.raises(ValueError, match="pack is 'half', expected True, False or 'bfloat16'"):
        stars_kernels.decode(model, rm, [1, 2], pack="half", **SET)
    x = torch.randn(5, 576)
    linear = nn.Linear(576, 100)
    packed = PackedLinear(linear, torch.bfloat16)
    assert packed.packed.dtype == torch.bfloat16
    expected = torch.nn.functional.linear(x, linear.weight.bfloat16().float(), linear.bias)
    torch.testing.assert_close(packed(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_rows_bits_do_not_depend_on_its_batch():
    packed = PackedLinear(nn.Linear(576, 200), torch.float32)
    x = torch.randn(37, 576)
    alone = torch.cat([packed(row[None]) for row in x])
    assert torch.equal(packed(x), alone)
    assert torch.equal(packed(x.view(37, 1, 576))[:, 0], alone)
    assert torch.equal(packed(x.flip(0)), alone.flip(0))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(ACT2CLS.keys() - {"prelu", "xielu"}))  # which have parameters
@torch.no_grad()
def test_an_activations_bits_do_not_depend_on_the_place(name, threads):
    """Neither at the end of a tensor nor, in large ones, at the borders between threads."""
    function = ACT2FN[name]
    activation = Elementwise(function)
    torch.set_num_threads(threads)
    try:
        for rows, size in [(7, 48), (3, 13), (5, 1), (7, 2432), (31, 4864), (13, 5001)]:
            x = 3 * torch.randn(rows, size)
            found = activation(x)
            assert torch.equal(found, torch.cat([activation(row[None]) for row in x]))
            assert torch.equal(activation(x.T).T, found)
            assert torch.equal(activation(x[:, ::2]), found[:, ::2])
            torch.testing.assert_close(found, function(x), rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(1)
    assert activation(x[:0]).shape == (0, size)


@torch.no_grad()
def test_activations_are_elementwise_on_the_view_alone():
    model = families.tiny("gemma").float()
    view, hooked = view_of(model), model.model.layers[1].mlp.act_fn
    pack(view)
    assert [type(layer.mlp.act_fn) for layer in view.model.layers] == 2 * [Elementwise]
    assert type(model.model.layers[0].mlp.act_fn) is type(hooked)
    hooked.register_forward_hook(lambda *_: None)
    view = view_of(model)
    pack(view)
    assert [type(layer.mlp.act_fn) for layer in view.model.layers] == [Elementwise, type(hooked)]
    prelu, model = nn.PReLU(4), nn.Sequential(nn.PReLU(4), nn.Softmax(-1))
    pack(model)
    assert [type(child) for child in model] == [type(prelu), nn.Softmax], "neither works element by element"


@torch.no_grad()
def test_a_conv1d_is_packed_as_the_linear_layer_that_it_is():
    layer, x = Conv1D(130, 96), torch.randn(9, 96)
    layer.bias.normal_()
    packed = PackedLinear(layer, torch.float32)
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(packed(x), torch.cat([packed(row[None]) for row in x]))
    view = view_of(families.tiny("gpt2").float())
    pack(view)
    assert not [module for module in view.modules() if type(module) in (nn.Linear, Conv1D)]


@pytest.mark.parametrize("family, mlp, norm", [
    ("qwen2", True, True), ("mistral", True, True), ("phi3", False, True), ("gemma", False, False),
])  # fmt: skip
@torch.no_grad()
def test_other_families_modules_that_work_as_llamas(family, mlp, norm):
    """A gated MLP with another activation, or a norm with 1 + weight, is none."""
    model = families.tiny(family).float()
    view = view_of(model)
    pack(view)
    kinds = {type(module) for module in view.modules()}
    assert (PackedMLP in kinds, RMSNorm in kinds) == (mlp, norm)
    ids = torch.arange(20)[None]
    view.set_attn_implementation("sdpa")
    torch.testing.assert_close(view(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [WIDE, {}, dict(WIDE, num_key_value_heads=4)], ids=["wide", "tiny", "grouped"])
def test_fp32_answers_are_bit_equal_whatever_the_width_and_the_batch(shape):
    """Every kernel of a packed Llama works row by row, in one order (tests/hf/test_families.py has the others)."""
    if stars_kernels.backends()["packed_linear"]["cpu"] != "cpp":
        pytest.skip("needs the compiled extension")
    model, rm = tiny_language_model(torch.float32, **shape), tiny_reward_model(torch.float32, **shape)
    prompts = [[1, 2, 3], list(range(40, 120)), [7], list(range(5, 25))]
    common = dict(SET, reward_threshold=2.0, max_attempts=9, max_new_tokens=17, temperature=1.5, eos_token_id=())

    def answers(ids, **config):
        outputs = stars_kernels.decode(model, rm, [prompts[i] for i in ids], request_ids=ids, **(common | config))
        return {
            i: (o.token_ids, o.reward, [s.rewards[: s.attempts] for s in o.segments])
            for i, o in zip(ids, outputs, strict=True)
        }

    expected = answers([0, 1, 2, 3], width=1, batch_size=1)
    assert any(len(rewards) > 1 for _, _, segments in expected.values() for rewards in segments)
    for width in (2, 5, 20, "auto"):
        assert answers([0, 1, 2, 3], width=width) == expected
        assert answers([2, 0, 3, 1], width=width, batch_size=3) == expected
    for wave in (1, 2, 5):
        assert answers([0, 1, 2, 3], width=5, wave=wave) == expected
    assert answers([1], width=4)[1] == expected[1]


def test_a_module_with_a_hook_is_left_alone():
    """Hooks on a user's model (to steer it, to look into it) run as they do in its own forward."""
    model, rm = wide_model(), tiny_reward_model(torch.float32, **WIDE)
    calls = []
    layer = model.model.layers[0]
    for module in (layer.mlp, layer.self_attn.q_proj, layer.input_layernorm, model.model.layers[1].mlp.up_proj):
        module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    output = stars_kernels.decode(model, rm, [1, 2], **SET)
    assert set(calls) == {"LlamaMLP", "Linear", "LlamaRMSNorm"} and calls.count("Linear") == 2 * calls.count("LlamaMLP")
    # q_proj, and of the second MLP the up_proj that is hooked; the first MLP's three are packed inside it.
    assert output.backends["linear"].endswith("; torch: 2 layers")


def test_weights_written_through_data_are_seen():
    linear = nn.Linear(96, 96)
    x = torch.randn(4, 96)
    for change in (lambda: linear.weight.data.mul_(2), lambda: setattr(linear.weight, "data", torch.randn(96, 96))):
        PackedLinear(linear, torch.float32)
        change()
        torch.testing.assert_close(PackedLinear(linear, torch.float32)(x), linear(x), rtol=1e-5, atol=1e-5)


class Mixer(nn.Module):
    """It takes weights by themselves, as some of transformers' mixers do: instead of a layer, or beside it."""

    def __init__(self):
        super().__init__()
        self.gate, self.out = nn.Linear(8, 4, bias=False), nn.Linear(4, 4)

    def forward(self, x):
        name = "gate"
        return self.out(nn.functional.linear(x, getattr(self, name).weight).to(self.out.weight.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_weight_that_is_read_by_itself_is_the_original(dtype):
    """However its name is written."""
    mixer, x = Mixer(), torch.randn(3, 8)
    expected, weights = mixer(x), [mixer.gate.weight, mixer.out.weight]
    assert pack(mixer, dtype) > 0
    assert [type(layer) for layer in (mixer.gate, mixer.out)] == 2 * [PackedLinear]
    assert mixer.gate.weight is weights[0] and mixer.out.weight is weights[1]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(mixer(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["bloom", "falcon_mamba", "falcon_h1", "bamba", "gemma3n_text"])
@torch.no_grad()
def test_families_that_read_weights_by_themselves(family):
    """All their linear layers are packed, and their logits are those of the layers unpacked."""
    model = families.tiny(family).float()
    view, packed = view_of(model), view_of(model)
    pack(packed)
    assert not [module for module in packed.modules() if type(module) is nn.Linear]
    expected, found = logits(view), logits(packed)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def logits(view):
    cache, prompt = open_cache(view, [11], 1), list(range(11))
    with cache.prefill([0], [len(prompt)]) as inputs:
        return view(input_ids=torch.tensor([prompt]), **inputs).logits


def cut(linear, rows=slice(None), columns=slice(None)):
    """Keep a part of a layer's weight, as pruning by hand does; its sizes stay as they were written down."""
    linear.weight = nn.Parameter(linear.weight.detach()[rows, columns].clone())


def test_an_output_layer_cut_short_draws_no_ids_that_do_not_exist():
    """Shapes are the weight's. (260 and 257 outputs take as many panels, and those without a weight have logit 0.)"""
    model, rm = tiny_language_model(torch.float32), tiny_reward_model(torch.float32)
    cut(model.lm_head, slice(257))
    settings = dict(SET, max_new_tokens=140, top_k=None, temperature=1e4, eos_token_id=(), request_ids=range(6))
    answers = [
        [o.token_ids for o in stars_kernels.decode(model, rm, [[1], [2], [3], [4], [5], [6]], pack=pack, **settings)]
        for pack in (True, False)
    ]
    assert max(max(ids) for ids in answers[0]) == 256
    assert answers[0] == answers[1]


def test_an_mlp_pruned_by_hand():
    model, rm = tiny_language_model(torch.float32), tiny_reward_model(torch.float32)
    for layer in model.model.layers:
        cut(layer.mlp.gate_proj, slice(40)), cut(layer.mlp.up_proj, slice(40))
        cut(layer.mlp.down_proj, columns=slice(40))
    packed, plain = (stars_kernels.decode(model, rm, [1, 2], pack=packs, **SET) for packs in (True, False))
    assert packed.token_ids == plain.token_ids and packed.reward == pytest.approx(plain.reward, abs=1e-4)
    cut(model.model.layers[0].mlp.up_proj, slice(39))  # which no SwiGLU can be made of, packed or not
    for packs in (True, False):
        with pytest.raises(RuntimeError, match="size of tensor"):
            stars_kernels.decode(model, rm, [1, 2], pack=packs, **SET)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_weights_that_are_views_into_one_vector_at_any_offset(dtype):
    """`torch.nn.utils.vector_to_parameters` makes them so."""
    models = tiny_language_model(dtype), tiny_reward_model(dtype)
    expected = stars_kernels.decode(*models, [1, 2], **SET)
    for model in models:
        vector = torch.cat([torch.zeros(1, dtype=dtype), nn.utils.parameters_to_vector(model.parameters()).detach()])
        nn.utils.vector_to_parameters(vector[1:], model.parameters())
        assert any(parameter.storage_offset() % 2 for parameter in model.parameters())
    output = stars_kernels.decode(*models, [1, 2], **SET)
    assert (output.token_ids, output.reward) == (expected.token_ids, expected.reward)


def test_a_weight_that_is_written_while_it_is_packed_is_packed_anew(monkeypatch):
    """Else the hash of what it was would stand beside the copy of what it became."""
    linear, x = nn.Linear(96, 96), torch.randn(4, 96)
    before, pack = linear.weight.detach().clone(), packing.ops.pack_linear

    def written(weight, dtype):
        weight.mul_(2)  # another thread
        return pack(weight, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(packing.ops, "pack_linear", written)
        PackedLinear(linear, torch.float32)
    linear.weight.data.copy_(before)
    torch.testing.assert_close(PackedLinear(linear, torch.float32)(x), linear(x), rtol=1e-5, atol=1e-5)
