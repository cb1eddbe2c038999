"""Heads of the user's on a backbone: the published formula's rewards on the same tokens or text, in float64."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, BertConfig, BertModel

import stars_kernels
from stars_kernels import GatedHead, RewardModel, StarsConfig
from tests.hf.loops import decode_as_the_sequential_loop
from tests.hf.scoring.test_text_rewards import LM_TEMPLATE, MERGING, text_of
from tests.tiny import byte_tokenizer, spelling_model, tiny_language_model, tiny_reward_model

SET = dict(seed=1, reward_threshold=2.0, beta=1.0, max_new_tokens=16, segment_size=4, max_attempts=6, progress=False)
CHAT = [{"role": "user", "content": "bca?"}]
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}#{% endfor %}"
D = 24


@pytest.fixture(scope="module")
def lm():
    return spelling_model("abc ")


def filled(module, seed=5):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def saved(folder, head, backbone=None, prefix="model.", tokenizer=None, architecture="RewardModelOfTheirs"):
    """A checkpoint as published: the backbone's keys behind `prefix`, the head's beside them."""
    backbone = tiny_reward_model().model if backbone is None else backbone
    folder.mkdir(exist_ok=True)
    config = copy.deepcopy(backbone.config)
    config.architectures, config.dtype = [architecture], "float64"
    config.save_pretrained(folder)
    weights = {prefix + name: weight for name, weight in backbone.state_dict().items()}
    save_file({name: weight.contiguous() for name, weight in (weights | head).items()}, folder / "model.safetensors")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def under(prefix, module):
    return {prefix + name: weight for name, weight in module.state_dict().items()}


@torch.no_grad()
def states_of(ids):
    """Hidden states [S, D] of the backbone that `saved` takes."""
    return tiny_reward_model().model(torch.tensor([ids])).last_hidden_state[0]


LINEAR = {
    "v_head": ("v_head.", nn.Linear(D, 1, bias=False)),
    "v_head.summary": ("v_head.summary.", nn.Linear(D, 1)),
    "regression_head": ("regression_head.", nn.Linear(D, 1, bias=False)),
    "score_head": ("score_head.", nn.Linear(D, 1)),
}
RELU = nn.ReLU()
SEQUENTIAL = {
    "score": ("score.", nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 1))),
    "v_head": ("v_head.summary.", nn.Sequential(nn.Linear(D, 7), RELU, nn.Linear(7, 7), RELU, nn.Linear(7, 1))),
}  # fmt: skip


@pytest.mark.parametrize(
    ("head", "keys", "module"),
    [(head, *form) for forms in (LINEAR, SEQUENTIAL) for head, form in forms.items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_head_by_the_prefix_of_its_keys(tmp_path, lm, head, keys, module):
    module = filled(copy.deepcopy(module))
    folder = saved(tmp_path, under(keys, module))

    def reward(ids):
        return module(states_of(ids)[-1]).item()

    output = stars_kernels.decode(lm, RewardModel(folder, head=head), [97, 98], **SET)
    assert output.reward == pytest.approx(reward([97, 98, *output.token_ids]), abs=1e-9)
    assert output.prompt_reward == pytest.approx(reward([97, 98]), abs=1e-9)


@pytest.mark.parametrize("tokenizer", [None, MERGING], ids=["ids", "text"])
def test_a_module_on_a_model_in_memory_is_the_sequential_algorithm(lm, tokenizer):
    """With two outputs, of which the second is the reward, and an activation that no key could tell."""
    rm, head = tiny_language_model(vocab_size=260 if tokenizer is None else 300, seed=1), filled(
        nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 2))
    )  # fmt: skip

    @torch.no_grad()
    def reward(prompt, answer):
        ids = prompt + answer if tokenizer is None else tokenizer(text_of(prompt) + text_of(answer))["input_ids"]
        return head(rm.model(torch.tensor([ids])).last_hidden_state[0, -1])[1].item()

    described = RewardModel(rm, tokenizer, head=head, label=1)
    decode_as_the_sequential_loop(lm, described, reward, ["ab", "cab bca"], StarsConfig(**SET))


def test_a_gated_head_reads_the_prompts_end_and_the_last_token(lm):
    rm, own = tiny_reward_model(), byte_tokenizer(TURNS)
    head = filled(GatedHead(nn.Linear(D, 3), nn.Sequential(nn.Linear(D, 3), nn.Softmax(-1)), "#[assistant]"))
    settings = dict(SET, tokenizer=byte_tokenizer(LM_TEMPLATE))
    output = stars_kernels.decode(lm, RewardModel(rm, own, head=head), CHAT, **settings)
    text = f"[user]bca?#[assistant]{output.text}#"
    states = states_of(own(text)["input_ids"])
    gate = head.gate(states[text.rindex("#[assistant]")])
    assert output.reward == pytest.approx((gate * head.objectives(states[-1])).sum().item(), abs=1e-9)
    whole = len(text) * sum(sum(segment.widths) for segment in output.segments)
    assert output.counts.rm_scored < whole / 2  # the prompt's end is read once


def test_wrong_heads_are_refused(tmp_path, lm):
    rm, short = tiny_reward_model(), dict(SET, tokenizer=byte_tokenizer())
    odd = saved(tmp_path / "odd", {"v_head.1.weight": torch.ones(1, D), "v_head.gain": torch.ones(1)})
    good = saved(tmp_path / "good", under("v_head.", filled(nn.Linear(D, 1))))
    lacking = saved(tmp_path / "lacking", {"v_head.weight": torch.ones(1, D)})
    weights = load_file(lacking / "model.safetensors")
    save_file({key: w for key, w in weights.items() if key != "model.norm.weight"}, lacking / "model.safetensors")
    gated = GatedHead(nn.Linear(D, 2).double(), nn.Linear(D, 2).double(), "#")
    for described, message in (
        (RewardModel(good, head="score"), "head is 'score', but no key .* begins with 'score.'; .* 'v_head.weight'"),
        (RewardModel(odd, head="v_head"), r"head is 'v_head', whose keys .* do not tell what it computes; .* \(else"),
        (RewardModel(good, head=("v_head", nn.Linear(D, 2))), r"'weight' has shape \[2, 24\], but .* has \[1, 24\]"),
        (RewardModel(good, head=("x", nn.Linear(D, 1))), "has a weight 'weight', but .* has no key 'x.weight'"),
        (RewardModel(lacking, head="v_head"), "has no norm.weight in its checkpoint, which would be random"),
        (RewardModel(rm, head="v_head"), "head is 'v_head', but reward_model .* in memory and has model, score"),
        (RewardModel(rm, head=nn.Linear(9, 1)), r"head Linear failed in a trial call on hidden states \[2, 24\]"),
        (RewardModel(rm, head=nn.Flatten(0)), r"head Flatten returned shape \[48\] for 2 hidden states"),
        (RewardModel(rm, head=nn.Linear(D, 2).double()), "has 2 labels, expected 1; say which one is the reward"),
        (RewardModel(rm, head=gated, label=1), "label is 1, but a gated head's reward is the sum"),
        (RewardModel(rm, head=gated, mark="#"), "mark is '#', but a gated head scores no steps; expected no mark="),
        (RewardModel(rm, head=gated, reduce="last"), "reduce is given, but reward_model is a backbone with a head"),
        (RewardModel(nn.Linear(D, 1), head=nn.Linear(D, 1)), "head is given, but reward_model is a head on hidden"),
        (RewardModel(BertModel(BertConfig(hidden_size=24, num_attention_heads=2)), head=gated), "is a BertModel, not"),
    ):
        with pytest.raises(ValueError, match=message):
            stars_kernels.decode(lm, described, "a", **short)
    for head in (3, "", ("v_head",), ("v_head", 1)):
        with pytest.raises(TypeError, match=r"head is .*, expected a module, the prefix of its keys"):
            RewardModel(rm, head=head)
    with pytest.raises(TypeError, match="prompt_end is '', expected a non-empty string"):
        GatedHead(nn.Linear(D, 2), nn.Linear(D, 2), "")
    with pytest.raises(stars_kernels.DecodeError, match="has no '#', expected the prompt_end at which its gate reads"):
        stars_kernels.decode(lm, RewardModel(rm, head=gated), "a", **short)


def test_backbone_keys_may_have_no_prefix(tmp_path, lm):
    """As a bare model is saved: the backbone is the same, which is shown by the same rewards."""
    head = filled(nn.Linear(D, 1))
    for name, prefix in (("bare", ""), ("inside", "model.")):
        saved(tmp_path / name, under("v_head.", head), prefix=prefix)
    assert type(AutoModel.from_pretrained(tmp_path / "bare")).__name__ == "LlamaModel"
    bare, inside = (
        stars_kernels.decode(lm, RewardModel(tmp_path / name, head="v_head"), [97], **SET)
        for name in ("bare", "inside")
    )
    assert (bare.token_ids, bare.reward) == (inside.token_ids, inside.reward)
