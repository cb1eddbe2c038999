"""What a model keeps of its past, as one forward of one token tells; and what is refused."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForSequenceClassification,
    DeepseekV3Config,
    Gemma3nTextConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MistralForSequenceClassification,
    Qwen3NextConfig,
    Qwen3NextForSequenceClassification,
    masking_utils,
)
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    padding_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

import stars_kernels
from stars_kernels.hf.cache import open_cache
from stars_kernels.hf.cache.prefill import packed_chunks
from stars_kernels.hf.view import layout as layout_module
from stars_kernels.hf.view.attention import FULL, Mask, UnsupportedModel, check_options, pattern_of
from stars_kernels.hf.view.copying import view_of
from stars_kernels.hf.view.layout import layout_of
from tests.hf.fork_check import PROMPTS, ROWS, check_decode, check_logits
from tests.tiny import VOCABULARY, tiny_reward_model

SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=160, initializer_range=0.4, bos_token_id=256, eos_token_id=257,
    pad_token_id=None,
)  # fmt: skip


def tiny(kind, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**SIZES, **changes})).double().eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the default has no float64
    return model


def mistral():
    return tiny(MistralConfig, head_dim=8, sliding_window=5)


def deepseek():
    return tiny(
        DeepseekV3Config, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=4, v_head_dim=8,
        qk_nope_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1,
        first_k_dense_replace=1, moe_intermediate_size=16, num_hidden_layers=3,
    )  # fmt: skip


def gemma3n():
    return tiny(
        Gemma3nTextConfig, head_dim=8, sliding_window=5, num_kv_shared_layers=2, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip


def lfm2():
    return tiny(Lfm2Config, layer_types=["conv", "full_attention", "conv", "full_attention"])


def qwen3_next():
    return tiny(
        Qwen3NextConfig, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )  # fmt: skip


def bloom():
    return tiny(BloomConfig, n_layer=2, n_head=4)


MODELS = {
    "window": mistral, "latent": deepseek, "shared": gemma3n, "conv": lfm2, "recurrent": qwen3_next, "alibi": bloom,
}  # fmt: skip
TOLERANCE = {"recurrent": 1e-4}
"""Its scan is in float32."""


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_answers_are_the_models_own(name):
    model = MODELS[name]()
    check_logits(model, TOLERANCE.get(name, 1e-6))
    check_decode(model)


CLASSIFIERS = {
    "window": MistralForSequenceClassification,
    "recurrent": Qwen3NextForSequenceClassification,
    "alibi": BloomForSequenceClassification,
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_rewards_are_the_models_own(lm, name):
    """Candidates of several lengths in one forward, some ended early: no other row's padding reaches a state."""
    torch.manual_seed(1)
    config = MODELS[name]().config
    config.num_labels, config.pad_token_id = 1, None
    model = CLASSIFIERS[name](config).double().eval()
    model.set_experts_implementation("eager")
    ends = tuple(range(0, VOCABULARY, 5))
    outputs = check_decode(lm, model, widths=(1, 4), max_new_tokens=14, eos_token_id=ends, reward_threshold=50.0)
    assert {n for output in outputs for segment in output.segments for n in segment.lengths} > {1, 4}
    for prompt, output in zip(PROMPTS[1:], outputs, strict=True):
        with torch.no_grad():
            own = model(torch.tensor([prompt + output.token_ids])).logits.item()
        assert output.reward == pytest.approx(own, abs=TOLERANCE.get(name, 1e-6))


def test_a_window_that_is_not_applied_is_seen():
    """What the checks above would say of a fork cache that takes a windowed layer for a full one."""
    model = mistral()
    model.config.sliding_window = None
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    view = view_of(model)
    reference = mistral()
    ids = torch.tensor([PROMPTS[0]])
    cache = open_cache(view, [20], 4)
    with torch.no_grad(), cache.prefill([0], [len(PROMPTS[0])]) as inputs:
        wrong = (view(input_ids=ids, **inputs).logits - reference(input_ids=ids).logits).abs()[0]
    assert wrong[:5].max() < 1e-6 and wrong[5:].max() > 0.01


def test_what_the_probe_finds():
    planes = {name: len(layout_of(view_of(MODELS[name]())).layers) for name in ("window", "latent", "shared", "conv")}
    assert planes == {"window": 4, "latent": 3, "shared": 4, "conv": 2}
    shared = layout_of(view_of(gemma3n()))
    assert [layer.source for layer in shared.layers] == [None, None, 0, 1]
    cache = open_cache(view_of(gemma3n()), [10], 4)
    assert [group.arena.shape[:2] for group in cache.groups] == [(2, 2)], "two layers store, four read"
    [layer, *_] = layout_of(view_of(deepseek())).layers
    assert (layer.key[:2], layer.value[:2]) == ((4, 12), (4, 8))
    keys, values = open_cache(view_of(deepseek()), [10], 4).groups
    assert (keys.arena.shape, values.arena.shape) == ((2, 2, 10, 4, 12), (2, 2, 10, 4, 8)), "three layers, two by two"
    modes = {name: layout_of(view_of(make())).mode for name, make in MODELS.items()}
    assert {name for name, mode in modes.items() if mode == "gathered"} == {"alibi"}
    assert {name for name in MODELS if layout_of(view_of(MODELS[name]())).states} == {"conv", "recurrent"}


def test_the_output_says_which_attention_ran(lm, rm):
    settings = dict(seed=0, reward_threshold=1.0, beta=1.0, max_new_tokens=4)
    assert stars_kernels.decode(lm, rm, [1], **settings).backends["fork_attention"] != "gathered"
    gathered = stars_kernels.decode(bloom(), rm, [1], **settings).backends["fork_attention"]
    assert gathered == "gathered: the model has no attention hook"


def test_layers_on_several_devices(monkeypatch):
    """The bookkeeping is copied to each device and never stale; to "cpu:0" torch copies as to a second device."""
    real = layout_module._probe

    def split(view):
        found = real(view)
        key, value = ((*plane[:3], torch.device("cpu", 0)) for plane in (found.layers[1].key, found.layers[1].value))
        return replace(found, layers=[found.layers[0], replace(found.layers[1], key=key, value=value)])

    monkeypatch.setattr(layout_module, "_probe", split)
    model, rm = tiny(LlamaConfig, num_hidden_layers=2), tiny_reward_model()
    cache = open_cache(view_of(model), [10], 4)
    assert [group.arena.shape[0] for group in cache.groups] == [1, 1] and len(cache._places) == 2
    assert cache.layout.why_eager == "the model lies on several devices"
    check_logits(model)
    check_decode(model, rm)


def visible(mask_function, window):
    """The predicate on index tensors: [40, 40] which keys each query sees."""
    zero, place = torch.zeros(1, 1, dtype=torch.int64), torch.arange(40)
    return mask_function(zero, zero, place[:, None], place[None]).expand(40, 40)


@pytest.mark.parametrize("window", [1, 2, 7, 100])
def test_patterns_are_what_transformers_predicates_say(window):
    place = torch.arange(40)
    back = place[:, None] - place[None]
    assert pattern_of(causal_mask_function) == FULL and torch.equal(visible(causal_mask_function, 0), back >= 0)
    sliding = sliding_window_causal_mask_function(window)
    assert pattern_of(sliding, window) == Mask(window)
    assert torch.equal(visible(sliding, window), (back >= 0) & (back < window))


PADDED = torch.ones(1, 40, dtype=torch.bool)
OTHERS = {
    "chunked_overlay": (chunked_causal_mask_function(5, torch.zeros(1, dtype=torch.int64)), 5),
    "bidirectional_mask_function": (bidirectional_mask_function, None),
    "sliding_window_bidirectional_overlay": (sliding_window_bidirectional_mask_function(5), 5),
    "padding_mask_function": (and_masks(causal_mask_function, padding_mask_function(PADDED)), None),
    "packed_sequence_mask_function": (
        and_masks(causal_mask_function, masking_utils.packed_sequence_mask_function(PADDED.long())), None,
    ),
    "or_masks": (or_masks(sliding_window_causal_mask_function(5), causal_mask_function), 5),
    "sliding_window_overlay": (sliding_window_overlay(5), 5),
    "partial": (partial(causal_mask_function), None),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_patterns_are_refused_by_name(name):
    mask_function, size = OTHERS[name]
    with pytest.raises(UnsupportedModel, match=rf"its attention mask is a .*{name}.*, expected a causal mask or a"):
        pattern_of(mask_function, size)


def test_a_window_of_another_size_is_refused():
    with pytest.raises(UnsupportedModel, match="sliding_window_overlay"):
        pattern_of(sliding_window_causal_mask_function(5), 6)


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (None, {}, "gets a mask of type NoneType, made without the mask hook"),
        (torch.ones(1, 1, 2, 2), {}, "gets a mask of type Tensor"),
        (FULL, {"sliding_window": 4}, "sliding_window=4 with a mask of window 0"),
        (FULL, {"is_causal": False}, "bidirectional"),
        (FULL, {"position_bias": torch.ones(1)}, "gets position_bias, which the fork cache does not know"),
        (Mask(4), {"sliding_window": 4, "alibi": 1, "indices": 2}, "gets alibi, indices, which"),
    ],
)
def test_what_would_change_an_attention_is_refused(mask, options, message):
    with pytest.raises(UnsupportedModel, match=message):
        check_options(mask, options)
    check_options(FULL, {"sliding_window": None, "dropout": 0.0, "position_bias": None})


def test_models_that_are_refused_in_the_probe(rm):
    llama4 = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).double().eval()
    llama4.config.is_causal = False
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be decoded exactly: its attention mask is a bidirec"):
        stars_kernels.decode(llama4, rm, [1], seed=0, reward_threshold=1.0, beta=1.0)


def filled(model, capacity=12):
    view = view_of(model)
    cache = open_cache(view, [len(p) + capacity for p in PROMPTS], 6)
    with torch.no_grad():
        for chunk in packed_chunks(dict(enumerate(PROMPTS)), cache):
            with cache.prefill(chunk.slots, chunk.counts) as inputs:
                view(input_ids=torch.tensor([chunk.ids]), **inputs)
    return view, cache


@torch.no_grad()
def test_states_know_no_earlier_token():
    view, cache = filled(lfm2())
    with pytest.raises(ValueError, match="a forward of 2 prompts, expected one"), cache.prefill([0, 1], [1, 1]):
        pass
    with pytest.raises(ValueError, match="slot 0 has 11 tokens already, expected 0"), cache.prefill([0], [1]):
        pass
    with pytest.raises(ValueError, match="a prefix is to be cut short"):
        cache.cut(torch.tensor([0]), torch.tensor([3]))
    cache.fork(torch.tensor(ROWS))
    for _ in range(2):
        with cache.extend(1) as inputs:
            logits = view(input_ids=torch.ones(len(ROWS), 1, dtype=torch.int64), **inputs).logits
    assert logits.isfinite().all()
    with pytest.raises(ValueError, match="rollback to 1 suffix tokens, expected 0: the model has states"):
        cache.rollback(1)
    # A candidate shorter than the forwards ended its answer: its state is of no use, and must show if it is read.
    one = torch.tensor([1])
    cache.commit(torch.tensor([0]), one, one, one.bool())()
    with pytest.raises(ValueError, match="go on after a commit, expected a fork before"), cache.extend(1):
        pass
    cache.fork(torch.tensor([0, 1]))
    with cache.extend(1) as inputs:
        logits = view(input_ids=torch.ones(2, 1, dtype=torch.int64), **inputs).logits
    assert logits[0].isnan().all() and logits[1].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["shared", "conv", "alibi"])
def test_selected_rows_and_shortened_prefixes(name):
    """Rows in pieces are the rows at once; a prefix that is cut is the shorter prefix."""
    view, cache = filled(MODELS[name]())
    tokens = torch.randint(0, 250, (len(ROWS), 3), generator=torch.Generator().manual_seed(1))

    def feed(rows):
        with cache.extend(3) as inputs:
            return view(input_ids=tokens[rows], **inputs).logits

    cache.fork(torch.tensor(ROWS))
    whole = feed(slice(6))
    cache.fork(torch.tensor(ROWS))
    pieces = []
    for rows in (slice(0, 2), slice(2, 6)):
        cache.select(rows)
        pieces.append(feed(rows))
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=1e-6)
    three = torch.tensor([3, 3, 3])
    cache.commit(torch.arange(3), torch.tensor([1, 3, 0]), three, three.bool())()  # rows of both pieces
    cache.fork(torch.arange(3))
    own = MODELS[name]()(input_ids=torch.tensor([PROMPTS[1] + tokens[3].tolist() + tokens[0].tolist()])).logits
    torch.testing.assert_close(feed([0, 0, 0])[1], own[0, -3:], rtol=0, atol=1e-5)
    if name != "conv":
        lengths = cache.lengths.clone()
        cache.cut(torch.tensor([0, 2]), torch.tensor([4, 99]))
        assert cache.lengths.tolist() == [4, lengths[1], lengths[2]]
        cache.fork(torch.tensor([0]))
        own = MODELS[name]()(input_ids=torch.tensor([PROMPTS[0][:4] + tokens[2].tolist()])).logits
        torch.testing.assert_close(feed([2])[0], own[0, -3:], rtol=0, atol=1e-5)


def mamba():
    return tiny(MambaConfig, state_size=8, num_hidden_layers=2)


@torch.no_grad()
def test_one_token_at_a_time():
    """Of Mamba, transformers computes one token behind a state exactly, and several wrongly."""
    check_logits(mamba(), steps_only=True)
    check_decode(mamba())
    _, cache = filled(mamba())
    cache.fork(torch.tensor(ROWS))
    with pytest.raises(ValueError, match="2 tokens at once, expected 1"), cache.extend(2):
        pass
