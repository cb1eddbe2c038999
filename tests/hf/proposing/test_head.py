"""Whether the output layer can be fused with the draw, as planted values tell; each thing that speaks against it."""

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.nn.functional import linear
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

import stars_kernels
from stars_kernels.hf.cache import open_cache
from stars_kernels.hf.families import WORKS
from stars_kernels.hf.proposing.output_layer import hidden_of, why_unfused
from stars_kernels.hf.view.copying import view_of
from stars_kernels.hf.view.logits import logits_of
from stars_kernels.hf.view.rewrites import pack
from tests.hf import families
from tests.tiny import tiny_language_model

CHANGES = """
    beam cohere cohere2 cohere2_moe falcon_mamba gemma2 gemma3_text gemma3n_text mamba mamba2 mllama nanochat vaultgemma
""".split()
"""Families that cap, scale or convert what their output layer returns, as the tiny models are set."""
BIAS = """
    bert bert-generation codegen ctrl electra ernie gptj modernbert-decoder phi roc_bert
""".split()
WORKING = [family for family, kind in FAMILIES.items() if kind in WORKS]


@torch.inference_mode()
def steps(view):
    """Logits [3, V] of one step behind a prompt of four tokens, and what the output layer reads in another."""
    cache, ids = open_cache(view, [4], 1), torch.tensor([[5], [6], [250]])
    with cache.prefill([0], [4]) as inputs:
        view(input_ids=torch.tensor([[1, 2, 3, 4]]), **inputs)
    found = []
    for step in (lambda inputs: logits_of(view, ids, inputs, 1), lambda inputs: hidden_of(view, ids, inputs)):
        cache.fork(torch.zeros(3, dtype=torch.int64))
        with cache.extend(1) as inputs:
            found.append(step(inputs)[:, 0])
    return found


@torch.no_grad()
def check_fused(view):
    assert why_unfused(view) is None
    logits, hidden = steps(view)
    assert torch.equal(linear(hidden, view.get_output_embeddings().weight), logits)


def where_it_works(family):
    first = families.SINCE.get(family, "0")
    old = Version(transformers.__version__) < Version(first)
    return pytest.param(family, marks=pytest.mark.skipif(old, reason=f"{family} takes transformers {first}"))


@pytest.mark.parametrize("family", map(where_it_works, WORKING))
def test_every_family_is_fused_or_says_why_not(family):
    view = view_of(families.tiny(family))
    why = why_unfused(view)
    if family in CHANGES:
        assert why == f"{type(view).__name__} changes the logits behind its output layer"
    elif family in BIAS:
        assert why == f"the output layer of {type(view).__name__} has a bias"
    else:
        check_fused(view)


@pytest.mark.parametrize("family, change", [
    ("gemma2", {"final_logit_softcapping": None}), ("cohere", {"logit_scale": 1.0}), ("mamba", {}),
])  # fmt: skip
def test_a_setting_without_effect_is_none(family, change):
    """No cap, a scale of 1, a conversion to the dtype that the logits have already."""
    check_fused(view_of(families.tiny(family, **change).float()))


@pytest.mark.parametrize("family, change", [
    ("gemma2", {"final_logit_softcapping": 1e4}), ("cohere", {"logit_scale": 1.0001}),
    ("granite", {"logits_scaling": 1.0001}), ("granite", {"logits_scaling": 8.0}),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_setting_of_the_config(family, change, dtype):
    view = view_of(families.tiny(family, **change).to(dtype))
    assert why_unfused(view) == f"{type(view).__name__} changes the logits behind its output layer"


def in_place(logits):
    logits[..., -1] = -torch.inf
    return logits


FAULTS = {
    "cap": lambda x: 1e4 * torch.tanh(x / 1e4),
    "clamp": lambda x: x.clamp(-500, 500),
    "scale": lambda x: x * (1.0001 if x.dtype == torch.float32 else 1.01),  # 1.0001 x is x in bfloat16
    "bias": lambda x: x + 1e-3,
    "mask": in_place,
    "scale in place": lambda x: x.mul_(1.01),
    "cast": lambda x: x.double(),
    "rounding": lambda x: x.to(torch.float8_e5m2).to(x.dtype),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_change_in_the_forward_itself(monkeypatch, fault, dtype):
    """Planted where no hook, no config and no name of a class tells of it."""
    model = tiny_language_model(dtype)
    assert why_unfused(view_of(model)) is None
    kind, forward = type(model), type(model).forward

    def changed(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = FAULTS[fault](output.logits)
        return output

    monkeypatch.setattr(kind, "forward", changed)
    assert why_unfused(view_of(model)) == "LlamaForCausalLM changes the logits behind its output layer"


def scaled(module, inputs, output):
    output.last_hidden_state = output.last_hidden_state * 3
    return output


def test_a_change_of_the_hidden_states_is_the_models_own():
    """Before its output layer a forward may do what it likes: `hidden_of` runs it."""
    model = tiny_language_model()
    before, _ = steps(view_of(model))
    model.model.register_forward_hook(scaled)
    check_fused(view_of(model))
    assert not torch.equal(steps(view_of(model))[0], before)


def test_a_bias():
    model = tiny_language_model()
    model.lm_head.bias = nn.Parameter(torch.full((260,), 1e-3, dtype=torch.float64))
    assert why_unfused(view_of(model)) == "the output layer of LlamaForCausalLM has a bias"


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks(register):
    """One that looks at logits is called in every forward, so that it sees logits; one on the body changes nothing."""
    model = tiny_language_model()
    getattr(model.model.layers[0], register)(lambda *_: None)
    check_fused(view_of(model))
    hook = getattr(model.lm_head, register)(lambda *_: None)
    assert "is a Linear, expected a torch.nn.Linear without hooks" in why_unfused(view_of(model))
    hook.remove()
    hook = getattr(model, register)(lambda *_: None)
    assert why_unfused(view_of(model)) == "LlamaForCausalLM has hooks, which may read or change its logits"
    hook.remove()
    check_fused(view_of(model))


def test_a_hook_on_all_modules_that_changes_logits():
    """torch's global hooks are on no module."""

    def scale(module, inputs, output):
        return output * 1.01 if isinstance(module, nn.Linear) and output.shape[-1] == 260 else None

    view = view_of(tiny_language_model())
    handle = nn.modules.module.register_module_forward_hook(scale)
    try:
        assert why_unfused(view) == "LlamaForCausalLM changes the logits behind its output layer"
    finally:
        handle.remove()


class Other(nn.Linear):
    """A layer of another class, as quantized ones and adapters are."""


class Weight(nn.Parameter):
    """A weight of another class, as torchao's quantized ones are."""


def test_other_layers_and_weights():
    model = tiny_language_model()
    model.lm_head.__class__ = Other
    assert why_unfused(view_of(model)).startswith("the output layer of LlamaForCausalLM is a Other, expected")
    model = tiny_language_model()
    model.lm_head.weight = Weight(model.lm_head.weight.detach())
    assert why_unfused(view_of(model)).startswith("the output layer of LlamaForCausalLM has a Weight as its weight")
    model = tiny_language_model()
    nn.utils.parametrizations.weight_norm(model.lm_head)
    assert "is a ParametrizedLinear, expected" in why_unfused(view_of(model))


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj"]])
def test_adapters(targets):
    peft = pytest.importorskip("peft", reason="needs peft")
    model = peft.get_peft_model(tiny_language_model(), peft.LoraConfig(r=2, target_modules=targets)).get_base_model()
    view = view_of(model)
    if targets == ["lm_head"]:
        assert why_unfused(view).startswith("the output layer of LlamaForCausalLM is a Linear, expected a torch.nn")
    else:
        check_fused(view)


def test_a_tied_output_layer():
    model = tiny_language_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check_fused(view_of(model))


def test_a_forward_that_calls_its_output_layer_otherwise(monkeypatch):
    model = tiny_language_model()
    kind, forward = type(model), type(model).forward

    def by_its_weight(self, input_ids, logits_to_keep=0, **kwargs):
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(logits=linear(hidden[:, -logits_to_keep:], self.lm_head.weight))

    def twice(self, *args, **kwargs):
        self.lm_head(torch.zeros(1, 24, dtype=torch.float64))
        return forward(self, *args, **kwargs)

    def of_all(self, input_ids, logits_to_keep=0, **kwargs):  # [8, 2, D], of which the last is kept
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden.repeat(1, 2, 1))[:, -1:])

    calls = {
        by_its_weight: "nothing",
        twice: "[1, 24] in torch.float64 and [8, 1, 24] in torch.float64",
        of_all: "[8, 2, 24] in torch.float64",
    }
    for changed, called in calls.items():
        monkeypatch.setattr(kind, "forward", changed)
        why = why_unfused(view_of(model))
        assert why == f"LlamaForCausalLM calls its output layer on {called} in a step of one token"


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(monkeypatch, fails):
    model = tiny_language_model()
    view, modules = view_of(model), []
    for part in (model, view):
        modules += [(module, set(vars(module)), dict(module._forward_hooks)) for module in part.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    if fails:
        monkeypatch.setattr(type(model.model.norm), "forward", None)
        with pytest.raises(TypeError):
            why_unfused(view)
    else:
        assert why_unfused(view) is None
    for module, names, hooks in modules:
        assert set(vars(module)) - names <= {"_stars_layout"} and module._forward_hooks == hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_packed_output_layer():
    view = view_of(tiny_language_model(torch.float32))
    if not pack(view):
        pytest.skip("needs the compiled extension")
    assert why_unfused(view).startswith("the output layer of LlamaForCausalLM is a PackedLinear, expected")


def test_the_output_says_why_it_is_not_used(lm, rm):
    output = stars_kernels.decode(lm, rm, [1, 2], reward_threshold=1.0, beta=1.0, max_new_tokens=2)
    assert output.backends["lm_head_sample"] == "not used: the model is not on a GPU"
