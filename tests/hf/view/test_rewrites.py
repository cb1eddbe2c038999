"""What stands for parts of a model's own code: found where it does the same, and nowhere else."""

import inspect
from types import FunctionType

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

import stars_kernels
from stars_kernels import ops
from stars_kernels.hf.cache import open_cache
from stars_kernels.hf.view.copying import view_of
from stars_kernels.hf.view.layout import layout_of
from stars_kernels.hf.view.rewrites import merge, merged, mlp, served
from stars_kernels.hf.view.rewrites.merged import Part, Product
from tests.hf import families
from tests.tiny import tiny_config, tiny_language_model, tiny_reward_model

PROMPT = [1, 2, 3, 40, 50]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(mlp, "fuses", lambda weight: True)
    monkeypatch.setattr(merged, "memory_of", lambda device: 2**40)


def logits(view):
    cache = open_cache(view, [len(PROMPT) + 4], 4)
    with torch.no_grad(), cache.prefill([0], [len(PROMPT)]) as inputs:
        return view(input_ids=torch.tensor([PROMPT]), **inputs).logits


def counted(call):
    """What a call returns, and the ops of this package that it made."""
    seen, real = [], ops.call_op

    def noting(name, *args):
        seen.append(name)
        return real(name, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "call_op", noting)
        return call(), seen


def test_a_layer_is_four_ops_and_an_attention(as_on_a_gpu):
    model = tiny_language_model(torch.float32)
    view = view_of(model)
    merge(view)
    layout_of(view)
    found, seen = counted(lambda: logits(view))
    assert {op: seen.count(op) for op in sorted(set(seen))} == {
        "add_rms_norm": 2, "gated": 2, "rms_norm": 3, "rotary_store": 2,
    }  # fmt: skip
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([PROMPT])).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert all(served(view).values())


def test_a_cpu_keeps_its_packed_layers():
    view = view_of(tiny_language_model(torch.float32))
    assert merge(view) == 0 and not any(isinstance(module, Part) for module in view.modules())
    assert served(view) == {"add_rms_norm": True, "gated": False, "rms_norm": True}


def test_the_users_model_is_left_alone(as_on_a_gpu):
    model = tiny_language_model(torch.float32)
    kinds = [type(module) for module in model.modules()]
    merge(view_of(model))
    assert [type(module) for module in model.modules()] == kinds
    forward = inspect.unwrap(LlamaAttention.forward)
    assert not hasattr(forward.__globals__["apply_rotary_pos_emb"], "__wrapped__")


def test_merged_layers_take_their_parts_and_know_their_input():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, n, dtype=torch.float64) for n in (6, 4, 3)]
    product = Product(layers)
    parts = [Part(product, i, layer) for i, layer in enumerate(layers)]
    x, other = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    for given in ([x] * 3, [other] * 3, [x, other, x], [x, x.clone(), other]):
        for layer, part, tensor in zip(layers, parts, given, strict=True):
            assert torch.allclose(part(tensor), layer(tensor))
    assert product._given is None and product._parts == [], "nothing is held behind the last"
    assert parts[1].weight is layers[1].weight


@pytest.mark.parametrize("why", ["hook", "bias", "dtype", "subclass"])
def test_what_is_not_alike_is_not_merged(as_on_a_gpu, why):
    model = tiny_language_model(torch.float32)
    attention = model.model.layers[0].self_attn
    if why == "hook":
        attention.q_proj.register_forward_hook(lambda *args: None)
    elif why == "bias":
        attention.k_proj.bias = torch.nn.Parameter(torch.zeros(16))
    elif why == "dtype":
        attention.v_proj.bfloat16()
    else:
        attention.q_proj.__class__ = type("Linear", (torch.nn.Linear,), {})
    view = view_of(model)
    merge(view)
    names = {name for name, module in view.named_modules() if isinstance(module, Part)}
    assert not any(name.startswith("model.layers.0.self_attn") for name in names)
    assert "model.layers.1.self_attn.q_proj" in names and "model.layers.0.mlp.up_proj" in names


def test_there_has_to_be_memory_for_a_copy(monkeypatch):
    view = view_of(tiny_language_model(torch.float32))
    size = 4 * 2 * (24 * (48 + 16 + 16) + 2 * 24 * 48)
    for room, expected in ((64 * size - 64, 0), (64 * size, size)):
        monkeypatch.setattr(merged, "memory_of", lambda device, room=room: room)
        assert merge(view) == expected


def test_queries_that_are_wanted_twice_are_turned_at_once():
    """DiffLlama attends twice with the same ones, Llama once."""
    assert [layer.rotates for layer in layout_of(view_of(families.tiny("diffllama"))).layers] == [False] * 4
    assert [layer.rotates for layer in layout_of(view_of(tiny_language_model())).layers] == [True] * 2


class OwnAttention(LlamaAttention):
    """A class of the user's own: who knows what else its forward does with what it has turned."""


def test_modules_of_others_keep_their_own_rotation():
    model = tiny_language_model()
    model.model.layers[1].self_attn.__class__ = OwnAttention
    assert [layer.rotates for layer in layout_of(view_of(model)).layers] == [True, False]


def test_what_is_turned_later_must_be_what_is_attended_with():
    view = view_of(tiny_language_model())
    attention = view.model.layers[1].self_attn
    layout_of(view)
    forward = inspect.unwrap(type(attention).forward)
    turn = forward.__globals__["apply_rotary_pos_emb"]
    names = {**forward.__globals__, "apply_rotary_pos_emb": lambda *given: [x * 1 for x in turn(*given)]}
    kind = type("Changing", (type(attention),), {"forward": FunctionType(forward.__code__, names)})
    attention.__class__ = kind
    with pytest.raises(RuntimeError, match="queries and keys that it had changed"):
        logits(view)


def test_an_answer_is_the_same_fused_and_merged(as_on_a_gpu, monkeypatch):
    models = tiny_language_model(), tiny_reward_model()
    settings = dict(seed=3, reward_threshold=2.0, beta=1.0, max_new_tokens=16, segment_size=5, width=3)
    fused = stars_kernels.decode(*models, PROMPT, **settings)
    assert fused.backends["rotary_store"] != "the model's own" == fused.backends["rms_norm"]  # norms: not in float64
    assert "merged weights" in fused.backends["linear"]
    monkeypatch.undo()
    assert stars_kernels.decode(*models, PROMPT, **settings).token_ids == fused.token_ids


def test_hidden_states_of_a_fused_layer_are_still_recorded():
    model = LlamaForCausalLM(tiny_config()).eval()
    view = view_of(model)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states
        view.set_attn_implementation("sdpa")
        found = view(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 3
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, expected, strict=True))
