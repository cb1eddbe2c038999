"""Every causal language model family of transformers decodes exactly, or is refused by name.

python -m tests.hf.test_families --write docs/families.md    # the table of what was found
"""

import argparse
import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIER_OF,
)

import stars_kernels
from stars_kernels.hf.families import CLASSIFIERS, REFUSED, WORKS
from stars_kernels.hf.view.copying import view_of
from stars_kernels.hf.view.layout import layout_of, takes
from tests.hf import bits_check, families
from tests.hf.family_table import DOCUMENT, measured, table
from tests.hf.fork_check import check_decode, check_logits
from tests.hf.reward_check import check_rewards
from tests.tiny import tiny_reward_model

WORKING = [family for family, kind in FAMILIES.items() if kind in WORKS]
NOT_WORKING = [family for family, kind in FAMILIES.items() if kind in REFUSED]
RATED = [family for family in FAMILIES if CLASSIFIER_OF.get(family) in CLASSIFIERS]
UNRATED = [family for family in FAMILIES if CLASSIFIER_OF.get(family) in REFUSED]
VARIANTS = {
    "falcon, ALiBi": ("falcon", {"alibi": True}),
    "falcon, new architecture": ("falcon", {"new_decoder_architecture": True}),
    "gpt2, scores by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_bigcode, all heads": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "opt, norm behind": ("opt", {"do_layer_norm_before": False}),
    "gemma4_text, experts": ("gemma4_text", dict(enable_moe_block=True, num_experts=4, top_k_experts=2,
                                                 moe_intermediate_size=16)),
    "gemma4_text, keys are values": ("gemma4_text", {"attention_k_eq_v": True}),
    "stablelm, norms of queries": ("stablelm", {"qk_layernorm": True}),
    "olmo, clipped": ("olmo", {"clip_qkv": 1.0}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
}  # fmt: skip
"""Other settings of a family that change its attention."""
NOT_CAUSAL = ["bert", "bert-generation", "electra", "ernie", "roc_bert"]
"""Encoders, which are language models with is_decoder=True alone."""


def test_every_family_of_transformers_is_known():
    """A new transformers with a family that nobody has looked at fails here, by its name."""
    known = {family: [kind in WORKS, kind in REFUSED] for family, kind in FAMILIES.items()}
    assert [family for family, (works, refused) in known.items() if works == refused] == []
    gone = set(WORKS) | {name for name in REFUSED if not name.endswith("ForSequenceClassification")}
    assert gone - set(FAMILIES.values()) == set()
    assert CLASSIFIERS - set(CLASSIFIER_OF.values()) == set()
    assert CLASSIFIERS & set(REFUSED) == set()
    rated = {CLASSIFIER_OF[family] for family in WORKING if family in CLASSIFIER_OF and family not in NOT_CAUSAL}
    assert rated - CLASSIFIERS - set(REFUSED) == set()


@torch.no_grad()
def own_cache_error(model, cuts):
    """How far a model's logits with its own DynamicCache, `cuts` tokens a forward, are from those without a cache."""
    name = layout_of(view_of(model)).argument
    cache, ids = DynamicCache(config=model.config), torch.arange(40, 40 + sum(cuts))[None]
    full, parts = model(input_ids=ids).logits, []
    for part in torch.arange(sum(cuts)).split(cuts):
        positions = {"position_ids": part[None]} if takes(model, "position_ids") else {}
        parts.append(model(input_ids=ids[:, part], use_cache=True, **{name: cache}, **positions).logits)
    return ((torch.cat(parts, dim=1) - full).abs().max() / full.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("family", sorted({*WORKING, *families.WRONG_IN_TRANSFORMERS}))
def test_the_models_own_cache(family):
    """Apart from our code: a tiny model is a sane subject, or transformers is known to be wrong about it."""
    model, wrong = families.tiny(family), families.WRONG_IN_TRANSFORMERS.get(family, ())
    for name, cuts in {"step": [11] + [1] * 6, "chunk": [11, 2, 4]}.items():
        error = own_cache_error(model, cuts)
        assert error > 1e-3 if name in wrong else error <= families.tolerance(family), (name, error)


@pytest.mark.parametrize("family", WORKING)
def test_logits_and_answers_are_the_models_own(family):
    """Logits through the fork cache, to the family's own rounding; answers token for token, for each width."""
    found = measured(family)
    assert found.error <= families.tolerance(family)
    assert found.path == WORKS[FAMILIES[family]]
    assert found.fused_error <= families.tolerance(family), found.fused
    check_decode(families.tiny(family))


@pytest.mark.parametrize("family", WORKING)
def test_the_check_sees_what_is_left_out(family):
    """Without window, soft-cap, sinks, states or padding mask, or with answers a position late, logits are far off."""
    found = measured(family)
    assert found.without
    for feature, error in found.without.items():
        assert error > 0.02, feature


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_settings_of_a_family(variant):
    family, changes = VARIANTS[variant]
    model = families.tiny(family, **changes)
    check_logits(model, families.tolerance(family))
    check_decode(model)


@pytest.mark.parametrize("family", NOT_WORKING)
def test_refused_by_name(family):
    model = families.refused(family)
    with pytest.raises(ValueError, match=re.escape(REFUSED[FAMILIES[family]])):
        stars_kernels.decode(model, tiny_reward_model(), [1, 2], max_new_tokens=4, reward_threshold=1.0, beta=1.0)


@pytest.mark.parametrize("family", [family for family in NOT_WORKING if family not in families.UNBUILT])
def test_refused_for_cause(family):
    """What is refused would fail or give other logits; encoders do where they are no decoders."""
    model = families.tiny(family, **families.CAUSE.get(family, {}))
    with pytest.raises(Exception) as failure:
        check_logits(model, 1e-3, steps_only=True)
    assert not isinstance(failure.value, ImportError)


@pytest.mark.parametrize("family", NOT_CAUSAL)
def test_an_encoder_that_is_no_decoder_is_refused(family):
    model = families.tiny(family, is_decoder=False)
    with pytest.raises(ValueError, match="bidirectional"):
        stars_kernels.decode(model, tiny_reward_model(), [1, 2], max_new_tokens=4, reward_threshold=1.0, beta=1.0)


@pytest.mark.parametrize("family", RATED)
def test_rewards_are_the_classifiers_own(family):
    check_rewards(families.tiny_reward(family), families.tolerance(family))
    check_decode(families.tiny(family), families.tiny_reward(family), widths=(3,))


@pytest.mark.parametrize("family", UNRATED)
def test_classifier_refused_by_name(family):
    model = families.tiny_reward(family)
    with pytest.raises(ValueError, match=re.escape(REFUSED[CLASSIFIER_OF[family]])):
        stars_kernels.decode(families.tiny("llama"), model, [1, 2], reward_threshold=1.0, beta=1.0)


@pytest.mark.skipif(not bits_check.compiled(), reason="needs the compiled extension")
@pytest.mark.parametrize("family", WORKING)
def test_fp32_answers_whatever_the_width_and_the_batch(family):
    """Tokens are equal; rewards too, to the bit, where no op runs whose roundings depend on the batch."""
    found = bits_check.measured(family)
    assert found.tokens
    assert found.rewards or found.ops


def test_the_document_is_what_is_found():
    """All but the digits of measured errors, which differ between processors.

    Without the compiled extension, which the column of bits is about, that is taken as it is written.
    """
    written = DOCUMENT.read_text()
    column = dict(re.findall(r"^\| (\S+) \|.*\| ([^|]*) \|$", written, re.MULTILINE))
    found = table() if bits_check.compiled() else table(column.__getitem__)

    def fixed(text):
        return re.sub(r"\d\.\de[+-]\d\d", "#", text)

    assert fixed(written) == fixed(found)


def test_the_texts_count_the_families_that_are_equal_to_the_bit():
    (equal,) = re.findall(r"equal to the bit in fp32: (\d+)", DOCUMENT.read_text())
    for name in ("README.md", "docs/exactness.md"):
        text = " ".join((DOCUMENT.parents[1] / name).read_text().split())  # wherever the line breaks
        assert f"{equal} of the {len(WORKING)}" in text, name


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser("python -m tests.hf.test_families", description="The table of families.")
    parser.add_argument("--write", type=Path, required=True, help="the document to write")
    parser.parse_args().write.write_text(table())
