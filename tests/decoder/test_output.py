"""What a decode gives back: written as JSON and read again, its errors' attributes, and the full trace."""

import copy
import json
import math
import pickle
from dataclasses import dataclass

import pytest
import torch

import stars_kernels
from stars_kernels import BestOf, BlockBestOf, DecodeError, Plain, Stars, StarsOutput
from stars_kernels.decoder.rules import RULES, Plan, Verdict, best
from stars_kernels.ops.philox import request_key
from tests.tiny import byte_tokenizer

SET = dict(reward_threshold=2.0, beta=1.0, max_new_tokens=10, segment_size=4, max_attempts=4, seed=1)
PROMPTS = [[1, 2, 3], [40]]


@dataclass(frozen=True)
class First:
    """Take the first attempt; a rule of a user's own."""

    size: int
    name: str = "first"

    def plan(self, answer):
        return Plan(self.size, 1)

    def judge(self, answer, candidates):
        return Verdict(best(candidates), "best")


class NoDataclass(First):
    def __init__(self):
        pass

    size = 3


def through_json(output, **options):
    text = json.dumps(output.to_dict(), allow_nan=False)
    return StarsOutput.from_dict(json.loads(text), **options)


def same(a, b):
    """NaN is no NaN's equal."""
    return str(a) == str(b) and repr(a.__dict__) == repr(b.__dict__)


@pytest.mark.parametrize("rule", [None, Stars(reward_threshold=2, beta=1), Plain(), BestOf(2), BlockBestOf((2, 1), 3)])
def test_outputs_survive_json(lm, rm, rule):
    settings = SET if rule is None else dict(max_new_tokens=10, seed=1)
    for trace in ("segments", "full"):
        output = stars_kernels.decode(
            lm,
            rm,
            "a",
            tokenizer=byte_tokenizer(),
            rule=rule,
            trace=trace,
            stop_strings="x",
            eos_token_id=[2],
            **settings,
        )
        again = through_json(output)
        assert same(again, output)
        assert again.config == output.config and again.counts == output.counts
    assert output.to_dict()["version"] == 1


def test_a_calibration_goes_with_it(lm, rm):
    output = stars_kernels.decode(lm, rm, PROMPTS, max_new_tokens=6, calibration_samples=2, seed=0)[0]
    again = through_json(output)
    assert again.calibration == output.calibration is not None


def test_rules_of_ones_own(lm, rm):
    output = stars_kernels.decode(lm, rm, PROMPTS[0], rule=First(3), max_new_tokens=6, seed=0)
    assert same(through_json(output, rules=[First]), output)
    with pytest.raises(ValueError, match=r"the rule is 'First', expected one of .*; pass a rule of your own"):
        through_json(output)
    output = stars_kernels.decode(lm, rm, PROMPTS[0], rule=NoDataclass(), max_new_tokens=6, seed=0)
    assert output.to_dict()["config"]["rule"]["name"] == "NoDataclass"
    for version in (0, 2, None):
        with pytest.raises(ValueError, match=f"the output has version {version}, expected a dict of version 1"):
            StarsOutput.from_dict({**output.to_dict(), "version": version})


def test_every_rule_of_the_package_is_known():
    exported = {getattr(stars_kernels, name) for name in stars_kernels.__all__}
    assert {kind for kind in exported if hasattr(kind, "judge")} == set(RULES)


def test_infinite_rewards_survive(lm):
    output = stars_kernels.decode(
        lm, lambda prompts, answers: [-math.inf if answer else 0.0 for answer in answers], "a",
        tokenizer=byte_tokenizer(), rule=BestOf(2), max_new_tokens=3, seed=0,
    )  # fmt: skip
    assert through_json(output).reward == -math.inf


def test_the_full_trace_has_the_tokens_of_all_attempts(lm, rm):
    plain = stars_kernels.decode(lm, rm, PROMPTS, **SET)
    full = stars_kernels.decode(lm, rm, PROMPTS, trace="full", **SET)
    assert [o.token_ids for o in full] == [o.token_ids for o in plain]
    assert all(segment.tokens is None for output in plain for segment in output.segments)
    for output in full:
        assert [t for segment in output.segments for t in segment.tokens[segment.chosen]] == output.token_ids
        for segment in output.segments:
            assert [len(tokens) for tokens in segment.tokens] == segment.lengths
    assert any(segment.attempts > 1 for output in full for segment in output.segments)
    with stars_kernels.Engine(lm, rm) as engine:  # what was rejected had the reward that the trace tells
        output, prompt = full[0], PROMPTS[0]
        before = []
        for segment in output.segments:
            answers = [before + tokens for tokens in segment.tokens]
            assert engine.score([prompt] * len(answers), answers) == pytest.approx(segment.rewards)
            before += segment.tokens[segment.chosen]
    with pytest.raises(ValueError, match='trace is \'all\', expected "segments" or "full"'):
        stars_kernels.StarsConfig(trace="all")


def test_errors_say_where(lm):
    def fails(prompts, answers):
        if any(len(answer) > 4 for answer in answers):
            raise KeyError("too long")
        return [float(len(answer)) for answer in answers]

    errors = stars_kernels.decode(
        lm, fails, ["a", "b"], tokenizer=byte_tokenizer(), request_ids=["x", "y"], errors="return",
        eos_token_id=(), **{**SET, "reward_threshold": -9.0, "segment_size": 3, "max_new_tokens": 12},
    )  # fmt: skip
    assert request_key(1, "x") != request_key(1, "y")
    for index, (error, request_id) in enumerate(zip(errors, ["x", "y"], strict=True)):
        assert isinstance(error, DecodeError) and isinstance(error.__cause__, KeyError)
        assert (error.index, error.request_id, error.what) == (index, request_id, "the reward model failed")
        assert error.segment >= 1 and error.attempt == 0
        assert str(error).startswith(f"prompt {index} (request {request_id}), segment {error.segment}: attempt 0: the")
        again = pickle.loads(pickle.dumps(error))
        assert str(again) == str(error) and vars(again) == {k: v for k, v in vars(error).items()}


def test_nan_logits_are_an_error_with_a_place(lm, rm):
    broken = copy.deepcopy(lm)  # deepcopy, as transformers leaves local functions as hooks on a model that was called
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    error = stars_kernels.decode(broken, rm, [1, 2], errors="return", **SET)
    assert isinstance(error, DecodeError) and (error.segment, error.attempt, error.index) == (0, 0, 0)
    assert error.what.startswith("the logits hold nan")
