"""Likelihood and DPO's implicit reward: the plain rewards, the sequential answers, every accepted token read once."""

import pytest
import torch

import stars_kernels
from stars_kernels import Likelihood, RewardModel
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.hf.proposing.proposer import ModelProposer
from stars_kernels.hf.scoring import likelihood
from stars_kernels.hf.scoring.likelihood import LikelihoodScorer
from stars_kernels.hf.view.copying import view_of
from stars_kernels.hf.view.rewrites import pack
from tests.hf import families
from tests.hf.loops import check_rewards, count_forwards, decided, loop_of, stop_at
from tests.hf.test_exactness import EOS_IDS, IDS, PROMPTS
from tests.sequential import sequential_decode
from tests.tiny import byte_tokenizer, tiny_language_model

SIZES = StarsConfig(max_new_tokens=22, segment_size=4, seed=3)
LIKELIHOOD = SIZES.replace(reward_threshold=-60.0, beta=5.0)
RATIO = SIZES.replace(reward_threshold=-20.0, beta=5.0)
FALLBACK = SIZES.replace(reward_threshold=1000.0, beta=0.1, max_attempts=7)
KINDS = {"likelihood": (False, LIKELIHOOD), "ratio": (True, RATIO), "fallback": (True, FALLBACK)}


@pytest.fixture(scope="module")
def policy():
    return tiny_language_model(seed=7, num_hidden_layers=3)


def log_likelihood(model, prompt, answer):
    """By the book: one forward of prompt + answer."""
    if not answer:
        return 0.0
    with torch.no_grad():
        log_probs = model(torch.tensor([list(prompt) + answer])).logits[0].log_softmax(-1)
    return sum(log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


def plain_reward(policy, reference):
    def reward(prompt, answer):
        return log_likelihood(policy, prompt, answer) - (log_likelihood(reference, prompt, answer) if reference else 0)

    return reward


def loop_with(lm, policy, reference, config, eos=(), find_stop=None):
    scorer = LikelihoodScorer(view_of(policy), reference and view_of(reference))
    return loop_of(ModelProposer(view_of(lm)), scorer, config, PROMPTS, IDS, eos, find_stop)


@pytest.fixture(scope="module", params=KINDS)
def truth(request, lm, policy):
    ratio, config = KINDS[request.param]
    reference = lm if ratio else None
    reward = plain_reward(policy, reference)
    answers = [sequential_decode(lm, reward, p, i, config, EOS_IDS) for p, i in zip(PROMPTS, IDS, strict=True)]
    assert max(n for _, attempts in answers for n in attempts) > 2
    return reference, config, answers


@torch.inference_mode()
@pytest.mark.parametrize("limit", [None, 2000], ids=["at once", "few logits"])
@pytest.mark.parametrize("width", [1, 5, "auto"])
def test_every_width_is_the_sequential_answer(truth, lm, policy, width, limit, monkeypatch):
    reference, config, expected = truth
    if limit is not None:
        monkeypatch.setattr(likelihood, "LOGITS", limit)
    loop = loop_with(lm, policy, reference, config.replace(width=width), EOS_IDS)
    assert decided(loop) == expected
    assert any(tokens[-1] in EOS_IDS for tokens, _ in expected)
    check_rewards(loop, plain_reward(policy, reference))


@torch.inference_mode()
@pytest.mark.parametrize("width", [1, 3])
def test_stop_strings_cut_inside_a_segment(lm, policy, width):
    """To the sequential algorithm a stop string of one token is an EOS."""
    config, reward = RATIO.replace(width=width), plain_reward(policy, lm)
    expected = [sequential_decode(lm, reward, p, i, config, EOS_IDS) for p, i in zip(PROMPTS, IDS, strict=True)]
    loop = loop_with(lm, policy, lm, config, find_stop=stop_at(EOS_IDS))
    assert decided(loop) == expected
    assert "stop" in [answer.finish_reason for answer in loop.answers]
    check_rewards(loop, reward)


@torch.inference_mode()
def test_a_fallback_from_an_earlier_round(lm, policy):
    loop = loop_with(lm, policy, lm, FALLBACK.replace(width=2))
    decided(loop)
    segments = [segment for answer in loop.answers for segment in answer.segments]
    assert any(s.outcome == "fallback" and s.chosen < s.attempts - s.widths[-1] for s in segments)
    check_rewards(loop, plain_reward(policy, lm))


@torch.inference_mode()
@pytest.mark.parametrize("ratio", [False, True], ids=["likelihood", "ratio"])
def test_every_accepted_token_is_read_once_by_each_model(lm, policy, ratio):
    config = SIZES.replace(reward_threshold=-1e6, beta=1.0, accept="hard", width=1)  # every first attempt is taken
    loop = loop_with(lm, policy, lm if ratio else None, config)
    loop.admit()
    shapes = [count_forwards(side.model) for side in loop.round.scorer.sides]
    for _ in loop.rounds():
        pass
    sides = 2 if ratio else 1
    assert shapes == sides * [[[len(PROMPTS), size] for size in (4, 4, 4, 4, 4, 2)]]
    assert [a.counts.rm_scored for a in loop.answers] == [sides * (len(prompt) + 22) for prompt in PROMPTS]


@torch.inference_mode()
@pytest.mark.parametrize(("tokens_at_once", "most"), [(0, 1), (1, 1), (7, 1), (8, 2), (15, 3), (1000, 4)])
def test_no_more_logits_than_stated(lm, policy, monkeypatch, tokens_at_once, most):
    """One token at least; then as many as fit, of one row, then of several."""
    monkeypatch.setattr(likelihood, "LOGITS", tokens_at_once * 260)
    scorer = LikelihoodScorer(view_of(policy))
    config = RATIO.replace(width=4, wave=4, max_new_tokens=20)  # segments of 4 tokens
    loop = loop_of(ModelProposer(view_of(lm)), scorer, config, PROMPTS[:1], IDS[:1])
    loop.admit()
    shapes = []
    scorer.sides[0].model.register_forward_hook(lambda model, given, output: shapes.append(output.logits.shape))
    for _ in loop.rounds():
        pass
    assert max(rows for rows, _, _ in shapes) == most
    assert all(rows * size <= max(tokens_at_once, 1) for rows, size, _ in shapes)


@pytest.mark.skipif(
    stars_kernels.backends()["packed_linear"]["cpu"] != "cpp", reason="the compiled extension is not there"
)
@pytest.mark.parametrize("limit", [None, 2000], ids=["at once", "few logits"])
@torch.inference_mode()
def test_fp32_rewards_are_bit_equal_whatever_the_width(monkeypatch, limit):
    if limit is not None:
        monkeypatch.setattr(likelihood, "LOGITS", limit)
    lm, policy = tiny_language_model(torch.float32), tiny_language_model(torch.float32, seed=7)
    loops = [loop_with(lm, policy, lm, RATIO.replace(width=width), EOS_IDS) for width in (1, 2, 5, 20)]
    rewards = []
    for loop in loops:
        for model in (loop.round.proposer.model, *(side.model for side in loop.round.scorer.sides)):
            assert pack(model) > 0
        decided(loop)
        rewards.append([segment.rewards for answer in loop.answers for segment in answer.segments])
    assert rewards == rewards[:1] * 4


@pytest.mark.parametrize("width", [1, 5])
def test_decode(truth, lm, policy, width):
    reference, config, expected = truth
    outputs = stars_kernels.decode(
        lm, Likelihood(policy, reference), PROMPTS, request_ids=IDS, config=config, width=width, eos_token_id=EOS_IDS
    )
    assert [(o.token_ids, [s.attempts for s in o.segments]) for o in outputs] == expected


def test_decode_by_path_and_with_a_weight(tmp_path, lm, policy):
    policy.save_pretrained(tmp_path / "policy")
    byte_tokenizer().save_pretrained(tmp_path / "policy")
    settings = dict(tokenizer=byte_tokenizer(), seed=1, reward_threshold=-4.0, beta=1.0, max_new_tokens=12)
    output = stars_kernels.decode(lm, RewardModel(Likelihood(tmp_path / "policy", lm), weight=0.2), "a", **settings)
    prompt = byte_tokenizer()("a")["input_ids"]
    assert output.reward == pytest.approx(0.2 * plain_reward(policy, lm)(prompt, output.token_ids), abs=1e-6)
    assert output.prompt_reward == 0.0


def test_models_that_cannot_judge_the_tokens_are_refused(tmp_path, lm, rm):
    larger = tiny_language_model(vocab_size=300)
    with pytest.raises(
        ValueError, match=r"reference LlamaForCausalLM \(.* 300 tokens\) has another tokenizer .*\(260\)"
    ):
        stars_kernels.decode(lm, Likelihood(lm, larger), [1], seed=0)
    with pytest.raises(
        ValueError, match=r"the likelihood's model LlamaForCausalLM .* is of the language model's token"
    ):
        stars_kernels.decode(lm, Likelihood(larger, lm), "a", tokenizer=byte_tokenizer(), seed=0)
    with pytest.raises(TypeError, match="the likelihood's model is of type NoneType, expected a causal language model"):
        Likelihood(None)
    with pytest.raises(TypeError, match="the likelihood's reference is of type int, expected a causal language model"):
        Likelihood(lm, 3)
    with pytest.raises(ValueError, match="the likelihood's model is a LlamaForSequenceClassification, not tested"):
        stars_kernels.decode(lm, Likelihood(rm), [1], seed=0)
    with pytest.raises(FileNotFoundError, match=r"the likelihood's reference is .*gone.*, which does not exist"):
        stars_kernels.decode(lm, Likelihood(lm, tmp_path / "gone"), [1], seed=0)
    swapped, names = byte_tokenizer(), byte_tokenizer().get_vocab()
    swapped.get_vocab = lambda: {**names, "a": names["b"], "b": names["a"]}
    with pytest.raises(ValueError, match=r"has another tokenizer than the language model .*, expected the same"):
        stars_kernels.decode(lm, RewardModel(Likelihood(lm), swapped), "a", tokenizer=byte_tokenizer(), seed=0)
    with pytest.raises(
        ValueError, match="the likelihood's model MambaForCausalLM reads one token at a time behind a state"
    ):
        stars_kernels.decode(lm, Likelihood(families.tiny("mamba")), [1], seed=0)
