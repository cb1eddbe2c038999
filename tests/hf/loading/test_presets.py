"""Published reward models: on random weights saved in their layout, the published formula's rewards in float64."""

import json
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import stars_kernels
from stars_kernels import RewardModel
from stars_kernels.hf.loading import presets
from tests.hf.scoring.test_heads import CHAT, SET, D, filled, saved, states_of, under
from tests.hf.scoring.test_text_rewards import LM_TEMPLATE
from tests.tiny import byte_tokenizer, spelling_model, tiny_language_model, tiny_reward_model

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}#{% endfor %}"
OWN = byte_tokenizer(TURNS, reverse=True)  # other ids than the language model's: what is read is text
ASKED = dict(SET, tokenizer=byte_tokenizer(LM_TEMPLATE))


@pytest.fixture(scope="module")
def lm():
    return spelling_model("ac\n", end=False)


def told(folder, **config):
    """Write more into the folder's config."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def states(text, **tokenised):
    return states_of(OWN(text, **tokenised)["input_ids"])


def mlp(*sizes):
    layers = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
    return filled(nn.Sequential(*layers[:-1]))


FORMS = {
    "INFORMForSequenceClassification": ("score.", mlp(D, D, 1)),
    "Qwen2ForRewardModel": ("score.", mlp(D, D, 1)),
    "LlamaRewardModel": ("regression_head.", filled(nn.Linear(D, 1, bias=False))),
    "EurusRewardModel": ("regression_head.", filled(nn.Linear(D, 1, bias=False))),
    "LlamaForScore": ("score_head.", filled(nn.Linear(D, 1))),
    "LlamaModelForScore": ("score_head.", filled(nn.Linear(D, 1, bias=False))),
    "GRM": ("v_head.summary.", mlp(D, 7, 1)),
}


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_head_at_the_last_token(tmp_path, lm, form):
    keys, head = FORMS[form]
    folder = saved(tmp_path, under(keys, head), tokenizer=OWN, architecture=form.replace("GRM", "LlamaForCausalLM"))
    if form == "GRM":
        told(folder, vhead_layer_type="mlp", vhead_num_neurons=7, vhead_num_layers=1)
    output = stars_kernels.decode(lm, RewardModel.from_pretrained(folder), CHAT, **ASKED)
    own = head(states(f"[user]bca?#[assistant]{output.text}#")[-1]).item()
    assert output.reward == pytest.approx(own, abs=1e-9)


@torch.no_grad()
def test_armo(tmp_path, lm, monkeypatch):
    """gating(prompt's end) . (regression(last) @ transform); the gate: four layers, a softmax at a temperature."""
    monkeypatch.setattr(presets.ArmoHead, "prompt_end", "#[assistant]")
    sizes, generator = [D, 5, 5, 5, 3], torch.manual_seed(6)
    layers = [(torch.randn(o, i).double(), torch.randn(o).double()) for i, o in pairwise(sizes)]
    regression, transform = torch.randn(3, D, generator=generator).double(), torch.randn(3, 3).double()
    keys = {"regression_layer.weight": regression, "reward_transform_matrix": transform}
    keys["gating.logit_scale"] = torch.tensor([1.5]).double()
    for i, (weight, bias) in enumerate(layers):
        keys |= {f"gating.layers.{i}.weight": weight, f"gating.layers.{i}.bias": bias}
    folder = saved(tmp_path, keys, tokenizer=OWN, architecture="LlamaForRewardModelWithGating")
    told(folder, num_objectives=3, gating_hidden_dim=5, gating_n_hidden=3, gating_temperature=2)
    output = stars_kernels.decode(lm, RewardModel.from_pretrained(folder), CHAT, **ASKED)
    text = f"[user]bca?#[assistant]{output.text}#"
    found = states(text)
    gate, last = found[text.rindex("#[assistant]")], found[-1]
    for weight, bias in layers[:-1]:
        gate = (weight @ gate + bias).relu()
    gate = ((layers[-1][0] @ gate + layers[-1][1]) / 2).softmax(0) * 1.5
    assert output.reward == pytest.approx((gate * (regression @ last @ transform)).sum().item(), abs=1e-9)


@torch.no_grad()
def test_qwens_process_reward_model(tmp_path, lm):
    """The probability of the second output at each <extra_0>, one behind every step, the last one too."""
    head, steps = mlp(D, D, 2), []
    folder = saved(tmp_path, under("score.", head), tokenizer=OWN, architecture="Qwen2ForProcessRewardModel")
    described = RewardModel.from_pretrained(folder, step="\n", reduce="prod")
    assert (described.mark, described.label) == ("<extra_0>", 1)
    output = stars_kernels.decode(lm, described, CHAT, **dict(ASKED, max_new_tokens=24))
    text = "[user]bca?#[assistant]"
    for step in filter(None, output.text.split("\n")):
        text += step + "<extra_0>"
        steps.append(head(states(text)[-1]).softmax(-1)[1].item())
    assert len(steps) > 1 and output.reward == pytest.approx(math.prod(steps), abs=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", presets.BY_NAME)
def test_language_models_by_hub_name(tmp_path, lm, monkeypatch, name):
    rm = tiny_language_model(seed=1)
    rm.save_pretrained(tmp_path)
    OWN.save_pretrained(tmp_path)
    monkeypatch.setitem(presets.BY_NAME, str(tmp_path), presets.BY_NAME[name])
    output = stars_kernels.decode(lm, RewardModel.from_pretrained(tmp_path), CHAT, **ASKED)

    def logits(text):
        return rm(torch.tensor([OWN(text)["input_ids"]])).logits[0, -1]

    if "Nemotron" in name:
        own = logits(f"[user]bca?#[assistant]{output.text}#")[0].item()
    else:
        text, steps, signs = "bca? ", [], [OWN(sign)["input_ids"][0] for sign in "+-"]
        for i, step in enumerate(filter(None, output.text.split("\n"))):
            text += "\n" * (i > 0) + step + " ки"
            steps.append(logits(text)[signs].softmax(0)[0].item())
        own = min(steps)
    assert output.reward == pytest.approx(own, abs=1e-9)


def test_what_transformers_knows_and_what_nobody_does(tmp_path, lm):
    tiny_reward_model().save_pretrained(tmp_path / "plain")
    assert RewardModel.from_pretrained(tmp_path / "plain", weight=2.0) == RewardModel(tmp_path / "plain", weight=2.0)
    odd = saved(tmp_path / "odd", {}, architecture="InternLM2ForRewardModel")
    message = "is a InternLM2ForRewardModel of model_type 'llama', which no preset knows; expected one of .*head=, for"
    with pytest.raises(ValueError, match=message):
        RewardModel.from_pretrained(odd)
    with pytest.raises(ValueError, match=r"is a InternLM2ForRewardModel, .*; pass RewardModel\.from_pretrained"):
        stars_kernels.decode(lm, odd, CHAT, **ASKED)
    with pytest.raises(OSError, match=r"reward_model .*none' cannot be read, neither as a folder"):
        RewardModel.from_pretrained(tmp_path / "none")
