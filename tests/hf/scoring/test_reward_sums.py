"""Several reward models as one, and what each kind refuses."""

import pytest
import torch

import stars_kernels
from stars_kernels import RewardModel, StarsConfig, StarsError
from tests.hf.loops import decode_as_the_sequential_loop
from tests.hf.scoring.test_text_rewards import MERGING, reward_of, text_of
from tests.tiny import byte_tokenizer, spelling_model, tiny_reward_model

SET = dict(seed=1, reward_threshold=2.0, beta=1.0, max_new_tokens=20, segment_size=4, max_attempts=6, progress=False)
PROMPTS = ["ab", "cab bca"]


@pytest.fixture(scope="module")
def lm():
    return spelling_model("abc ")


@pytest.fixture(scope="module")
def parts():
    """By token ids, through text, and a function."""
    return tiny_reward_model(), tiny_reward_model(seed=5, vocab_size=300), vowels


def vowels(prompts, answers):
    return [float(answer.count("a")) for answer in answers]


def test_decode_is_the_sequential_algorithm(lm, parts):
    by_ids, by_text, function = parts
    plain = byte_tokenizer()

    def reward(prompt, answer):
        text = text_of(answer)
        first = by_ids(torch.tensor([prompt + answer])).logits.item()
        return first - 0.5 * reward_of(by_text, MERGING, text_of(prompt) + text) + 0.25 * text.count("a")

    described = [by_ids, RewardModel(by_text, MERGING, weight=-0.5), RewardModel(function, weight=0.25)]
    config = StarsConfig(**SET)
    every, attempts = decode_as_the_sequential_loop(lm, described, reward, PROMPTS, config)
    assert max(map(max, attempts)) > 1
    for outputs in every:
        for output, prompt in zip(outputs, PROMPTS, strict=True):
            assert output.reward == pytest.approx(reward(plain(prompt)["input_ids"], output.token_ids), abs=1e-9)


def test_counts_are_summed(lm, parts):
    by_ids, _, function = parts
    settings = dict(SET, tokenizer=byte_tokenizer())
    one = stars_kernels.decode(lm, by_ids, "ab", **settings)
    same = stars_kernels.decode(
        lm, [RewardModel(by_ids, weight=0.75), RewardModel(by_ids, weight=0.25)], "ab", **settings
    )
    assert same.token_ids == one.token_ids and same.counts.rm_scored == 2 * one.counts.rm_scored
    text_alone = stars_kernels.decode(lm, [function, function], "ab", **settings)
    assert text_alone.counts.rm_scored == 0


def test_a_weight_alone_scales(lm, parts):
    settings = dict(SET, tokenizer=byte_tokenizer())
    one = stars_kernels.decode(lm, parts[0], "ab", **settings)
    settings |= dict(reward_threshold=20.0, beta=10.0)
    ten = stars_kernels.decode(lm, RewardModel(parts[0], weight=10), "ab", **settings)
    assert ten.token_ids == one.token_ids and ten.reward == pytest.approx(10 * one.reward)


def test_one_parts_error_is_the_rows(lm, parts):
    def failing(prompts, answers):
        if "b" in prompts:
            raise OSError("not for b")
        return [0.0] * len(answers)

    with pytest.raises(StarsError) as failed:
        stars_kernels.decode(lm, [parts[0], failing], ["a", "b"], tokenizer=byte_tokenizer(), **SET)
    assert list(failed.value.errors) == [1] and "OSError: not for b" in str(failed.value.errors[1])


def test_what_is_refused(lm, parts):
    settings = dict(SET, tokenizer=byte_tokenizer())
    for rm, message in (
        ([], "reward_model is an empty list, expected at least one reward model"),
        (
            RewardModel(vowels, byte_tokenizer()),
            "tokenizer is given, but reward_model is a function of texts, which takes none",
        ),
        (RewardModel(vowels, label=0), "label is given, but reward_model is a function of texts"),
        (RewardModel(parts[0], reduce="mean"), "reduce is given, but reward_model is a sequence classifier"),
        (RewardModel(parts[0], step="x"), "step is given, but reward_model is a sequence classifier"),
    ):
        with pytest.raises(ValueError, match=message):
            stars_kernels.decode(lm, rm, "a", **settings)
    for item, kind in ((3, "int"), (None, "NoneType"), ([parts[0]], "list"), ((parts[0], 0.5), "tuple")):
        with pytest.raises(
            TypeError, match=rf"reward_model\[1\] is of type {kind}, expected .* RewardModel\(\.\.\., weight=\)"
        ):
            stars_kernels.decode(lm, [parts[0], item], "a", **settings)
    for weight in (float("nan"), "x", True):
        with pytest.raises(TypeError, match=f"weight is {weight!r}, expected a finite number"):
            RewardModel(parts[0], weight=weight)
    for template in ("{prompt}", "{x}", "{prompt", "{0}{answer}"):
        with pytest.raises(ValueError, match="expected a format string"):
            RewardModel(parts[0], template=template)
    with pytest.raises(TypeError, match="template is of type int, expected a format string, a function or None"):
        RewardModel(parts[0], template=3)
