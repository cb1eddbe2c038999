"""The definition of STARS against a loop by a second hand, and what a rule's plan means."""

import pytest

from stars_kernels import Args, SpeculativeRejection, Stars, StarsConfig
from tests.by_hand import decode_by_hand
from tests.hf.test_exactness import CONFIGS, EOS_IDS, IDS, PROMPTS
from tests.sequential import sequential_answer, sequential_decode

BY_FLAT_SETTINGS = [name for name, config in CONFIGS.items() if config.rule is None]


@pytest.mark.parametrize("name", BY_FLAT_SETTINGS)
def test_the_definition_is_the_papers_loop(lm, rm, name):
    for prompt, id_ in zip(PROMPTS, IDS, strict=True):
        expected = decode_by_hand(lm, rm, prompt, id_, CONFIGS[name], EOS_IDS)
        assert sequential_decode(lm, rm, prompt, id_, CONFIGS[name], EOS_IDS) == expected


def test_a_stop_ends_the_definition_as_the_loop_by_hand(lm, rm):
    def stops(answer):
        return answer[-1] % 7 == 3

    for prompt, id_ in zip(PROMPTS, IDS, strict=True):
        arguments = (lm, rm, prompt, id_, CONFIGS["soft"], EOS_IDS)
        assert sequential_decode(*arguments, stops=stops) == decode_by_hand(*arguments, stops=stops)


def test_flat_settings_are_those_of_stars(lm, rm):
    flat = CONFIGS["soft"]
    rule = Stars(segment_size=4, reward_threshold=2.0, beta=1.0)
    assert flat.resolved_rule == rule
    given = StarsConfig(seed=flat.seed, rule=rule, max_new_tokens=flat.max_new_tokens)
    answers = [sequential_answer(lm, rm, PROMPTS[0], IDS[0], config, EOS_IDS) for config in (flat, given)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_rule_takes(lm, rm, name):
    """Rewards, chosen attempts and outcomes of the trace say what the rule's definition says."""
    config = CONFIGS[name]
    answer = sequential_answer(lm, rm, PROMPTS[2], IDS[2], config, EOS_IDS)
    for block, segment in enumerate(answer.segments):
        best = segment.rewards.index(max(segment.rewards))
        if segment.outcome == "accepted":
            assert segment.chosen == segment.attempts - 1
        elif not isinstance(config.rule, Args | SpeculativeRejection):
            assert segment.chosen == best
        if config.rule is not None and not isinstance(config.rule, Stars | SpeculativeRejection):
            schedule = getattr(config.rule, "schedule", (getattr(config.rule, "n", getattr(config.rule, "k", 1)),))
            assert segment.outcome == "best" and segment.attempts == schedule[min(block, len(schedule) - 1)]
    assert sum(segment.length for segment in answer.segments) == len(answer.tokens)
