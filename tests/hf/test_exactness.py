"""Token-for-token equality with the sequential algorithm, in float64, for every width, batch and order."""

import pytest
import torch

import stars_kernels
from stars_kernels import Args, BestOf, BlockBestOf, Cards, Plain, SpeculativeRejection, Stars
from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.config import StarsConfig
from tests.sequential import sequential_decode
from tests.tiny import EOS, tiny_language_model, tiny_reward_model

PROMPTS = [[1, 2, 3], [40], [7, 8, 9, 10, 11, 12, 13, 200], [40], [90, 91, 92, 93, 94]]
IDS = [10, 11, "twelve", 13, 14]
CONFIGS = {
    "soft": StarsConfig(seed=3, reward_threshold=2.0, beta=1.0),
    "hard": StarsConfig(seed=4, reward_threshold=1.0, beta=1.0, accept="hard", max_attempts=5),
    "filters": StarsConfig(
        seed=5, reward_threshold=2.0, beta=0.5, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, alpha=0.2
    ),
    "fallback": StarsConfig(seed=6, reward_threshold=100.0, beta=0.1, max_attempts=7, top_k=None),
}
CONFIGS = {name: config.replace(max_new_tokens=22, segment_size=4) for name, config in CONFIGS.items()}
CONFIGS |= {
    name: StarsConfig(seed=7 + i, rule=rule, max_new_tokens=22, temperature=0.9)
    for i, (name, rule) in enumerate(
        {
            "stars": Stars(segment_size=4, reward_threshold=2.0, beta=1.0),
            "plain": Plain(),
            "best of": BestOf(5),
            "block best of": BlockBestOf(3, segment_size=5),
            "schedule": BlockBestOf((6, 3, 1), segment_size=4),
            "args": Args(4, 0.7),
            "speculative rejection": SpeculativeRejection(6, keep=0.6, segment_size=5),
            "cards": Cards(segment_size=6, entropy_threshold=4.0, reward_threshold=2.0, beta=1.0),
        }.items()
    )
}
EOS_IDS = (EOS, 3, 77, 130)  # more ends than one, so that some answers end early


@pytest.fixture(scope="module", params=CONFIGS)
def truth(request, lm, rm):
    config = CONFIGS[request.param].replace(eos_token_id=EOS_IDS)
    answers = [
        sequential_decode(lm, rm, prompt, id_, config, EOS_IDS) for prompt, id_ in zip(PROMPTS, IDS, strict=True)
    ]
    return config, dict(zip(IDS, answers, strict=True))


def check(outputs, ids, expected):
    for output, id_ in zip(outputs, ids, strict=True):
        tokens, attempts = expected[id_]
        assert output.token_ids == tokens
        assert [segment.attempts for segment in output.segments] == attempts
        assert output.finish_reason == ("eos" if tokens[-1] in EOS_IDS else "length")


def test_the_truth_is_varied(truth):
    config, expected = truth
    attempts = [n for _, per_segment in expected.values() for n in per_segment]
    twice = isinstance(config.rule, Args)  # two prompts are equal, and nothing is random
    assert len({tuple(tokens) for tokens, _ in expected.values()}) == len(IDS) - twice
    assert max(attempts) > 1 or isinstance(config.rule, Plain)


@pytest.mark.parametrize("width", [1, 2, 5, 20, "auto"])
def test_every_width_is_the_sequential_answer(truth, lm, rm, width):
    config, expected = truth
    outputs = stars_kernels.decode(lm, rm, PROMPTS, request_ids=IDS, config=config, width=width)
    check(outputs, IDS, expected)


@pytest.mark.parametrize("wave", [1, 2, 3])
def test_every_wave_is_the_sequential_answer(truth, lm, rm, wave):
    """And the reward model reads what the rule judges, and in each round less than a wave more."""
    config, expected = truth
    outputs = stars_kernels.decode(lm, rm, PROMPTS, request_ids=IDS, config=config, width=5, wave=wave)
    check(outputs, IDS, expected)
    early = config.resolved_rule.plan(Answer(0, [0], 22)).early
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        beyond = output.counts.rm_scored - len(prompt) - output.counts.judged
        assert 0 <= beyond
        if early:
            assert beyond <= (wave - 1) * config.resolved_rule.segment_size * len(output.segments)


SLOTS = {1: (3, 2), 2: (1, 1), 3: ("auto", "auto"), 4: (5, 2)}  # and the width and wave of each


@pytest.mark.parametrize("slots", SLOTS)
def test_every_number_of_slots_is_the_sequential_answer(truth, lm, rm, slots):
    """The third prompt is the longest, so that others take and leave its place."""
    config, expected = truth
    width, wave = SLOTS[slots]
    order = IDS if slots % 2 else IDS[::-1]
    prompts = [PROMPTS[IDS.index(id_)] for id_ in order]
    shaped = config.replace(width=width, wave=wave, batch_size=slots)
    check(stars_kernels.decode(lm, rm, prompts, request_ids=order, config=shaped), order, expected)


@pytest.mark.parametrize("width", [1, 5])
def test_alone_and_in_another_order(truth, lm, rm, width):
    config, expected = truth
    settings = dict(config=config, width=width)
    for prompt, id_ in zip(PROMPTS, IDS, strict=True):
        check([stars_kernels.decode(lm, rm, prompt, request_ids=id_, **settings)], [id_], expected)
    backwards = IDS[::-1]
    check(stars_kernels.decode(lm, rm, PROMPTS[::-1], request_ids=backwards, **settings), backwards, expected)


def test_definitions_give_the_same_answer(truth, lm, rm):
    config, expected = truth
    with stars_kernels.reference():
        outputs = stars_kernels.decode(lm, rm, PROMPTS, request_ids=IDS, config=config)
    check(outputs, IDS, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_two_calls_are_bit_identical(dtype):
    lm, rm = tiny_language_model(dtype), tiny_reward_model(dtype)
    first, second = (stars_kernels.decode(lm, rm, PROMPTS, seed=9, max_new_tokens=30) for _ in range(2))
    assert [o.token_ids for o in first] == [o.token_ids for o in second]
    assert [o.reward for o in first] == [o.reward for o in second]
    assert [o.config for o in first] == [o.config for o in second]


def test_default_request_ids_do_not_depend_on_order(lm, rm):
    settings = dict(seed=1, reward_threshold=1.0, beta=1.0, max_new_tokens=12)
    a, b, c = stars_kernels.decode(lm, rm, [[5, 6], [40], [40]], **settings)
    d, e, f = stars_kernels.decode(lm, rm, [[40], [5, 6], [40]], **settings)
    assert (a.token_ids, b.token_ids, c.token_ids) == (e.token_ids, d.token_ids, f.token_ids)
    assert b.token_ids != c.token_ids  # equal prompts are different requests
