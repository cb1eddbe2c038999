"""Waves: what is not judged is not scored, for every kind of reward model, and no answer knows."""

import math

import pytest
import torch
from torch import nn

import stars_kernels
from stars_kernels import BestOf, Likelihood, RewardModel, SpeculativeRejection
from stars_kernels.decoder.round import Round
from stars_kernels.decoder.rules import Plan, Verdict, best
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

PROMPTS = ["ab", "cab", "c"]
SET = dict(
    seed=2, reward_threshold=1.0, beta=1.0, max_new_tokens=20, segment_size=4, max_attempts=9, width=6,
    eos_token_id=(), request_ids=range(3), progress=False,
)  # fmt: skip

RULELESS = {name: SET[name] for name in ("seed", "eos_token_id", "request_ids", "progress")}
RULELESS["tokenizer"] = byte_tokenizer()


def spread(prompts, answers):
    """Rewards of texts that differ with every character."""
    return [math.fsum(math.sin(7.0 * ord(c) + i) for i, c in enumerate(answer)) for answer in answers]


def head():
    torch.manual_seed(4)
    return nn.Linear(24, 1).double().requires_grad_(False)


KINDS = {
    "classifier": tiny_reward_model,
    "text": lambda: RewardModel(tiny_reward_model(), byte_tokenizer(reverse=True)),
    "head": head,
    "likelihood": lambda: Likelihood(tiny_language_model(seed=8), tiny_language_model(seed=9)),
    "function": lambda: spread,
    "sum": lambda: [RewardModel(tiny_reward_model(), weight=0.5), RewardModel(spread, weight=0.5)],
}


class Pattern:
    """Takes these attempts, or the best so far: in a round's first wave, in a later one, in a second round."""

    attempts = (2, 8, 1, 6)

    def plan(self, answer):
        return Plan(size=4, attempts=9, early=True)

    def judge(self, answer, candidates):
        taken = len(candidates) == self.attempts[(answer.decided + answer.key) % 4]
        top = best(candidates)
        return Verdict(top if answer.decided % 2 else len(candidates) - 1, "best" if taken else None)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_answers_and_reads_less(lm, kind):
    rm = KINDS[kind]()
    found, settings = {}, dict(RULELESS, rule=Pattern(), width=6, max_new_tokens=20)
    for wave in (6, 1, 2, 4, "auto"):
        outputs = stars_kernels.decode(lm, rm, PROMPTS, wave=wave, **settings)
        found[wave] = [
            (output.token_ids, [segment.attempts for segment in output.segments], round(output.reward, 9))
            for output in outputs
        ]
        read = sum(output.counts.rm_scored for output in outputs)
        judged = sum(output.counts.judged for output in outputs)
        if wave == 6:
            whole = read
        elif kind in ("head", "function"):
            assert read == 0
        elif wave == 1 and kind == "classifier":
            assert read == judged + sum(len(prompt) for prompt in PROMPTS) < 0.8 * whole
        else:
            assert read < whole
    assert all(answers == found[6] for answers in found.values())
    assert {n for _, attempts, _ in found[6] for n in attempts} == {*Pattern.attempts}


def test_a_function_is_asked_about_what_is_judged(lm):
    asked = []

    def rm(prompts, answers):
        asked.extend(answers)
        return spread(prompts, answers)

    outputs = stars_kernels.decode(lm, rm, PROMPTS, tokenizer=byte_tokenizer(), wave=1, **SET)
    assert len(asked) == len(PROMPTS) + sum(output.counts.attempts for output in outputs)
    asked.clear()
    stars_kernels.decode(lm, rm, PROMPTS, tokenizer=byte_tokenizer(), wave=6, **SET)
    assert len(asked) > 1.5 * sum(output.counts.attempts for output in outputs)


def failing(bad, fails):
    """`spread`, but that the reward of one answer cannot be had."""

    def rm(prompts, answers):
        if fails == "raises" and bad in answers:
            raise ValueError("that one")
        return [math.nan if answer == bad else r for answer, r in zip(answers, spread(prompts, answers), strict=True)]

    return rm


@pytest.mark.parametrize("wave", [1, 2, 6])
@pytest.mark.parametrize("fails", ["raises", "nan"])
def test_a_fault_ends_an_answer_where_it_is_judged(lm, wave, fails):
    settings = dict(SET, tokenizer=byte_tokenizer(), wave=wave, trace="full", errors="return")
    plain = stars_kernels.decode(lm, spread, PROMPTS, **settings)
    late = [number for number, output in enumerate(plain) if output.segments[0].attempts > 1]
    assert late
    for number in late:
        first = plain[number].segments[0]
        bad = byte_tokenizer().decode(first.tokens[-2])  # judged, and not taken
        found = stars_kernels.decode(lm, failing(bad, fails), PROMPTS, **settings)
        error = found.pop(number)
        assert isinstance(error, stars_kernels.DecodeError)
        assert (error.segment, error.attempt) == (0, first.attempts - 2)
        others = [output for other, output in enumerate(plain) if other != number]
        assert [output.token_ids for output in found] == [output.token_ids for output in others]


@pytest.mark.parametrize("wave", [1, 2, 6])
@pytest.mark.parametrize("fails", ["raises", "nan"])
def test_a_fault_behind_the_one_that_is_taken_is_none(lm, wave, fails):
    settings = dict(SET, tokenizer=byte_tokenizer(), wave=wave)
    plain = stars_kernels.decode(lm, spread, PROMPTS, **settings)
    every = stars_kernels.decode(lm, spread, PROMPTS, trace="full", rule=BestOf(6), max_new_tokens=4, **RULELESS)
    early = [number for number, output in enumerate(plain) if output.segments[0].attempts < 6]
    assert early
    for number in early:
        taken = plain[number].segments[0].attempts
        bad = byte_tokenizer().decode(every[number].segments[0].tokens[taken])  # the next attempt at the first segment
        found = stars_kernels.decode(lm, failing(bad, fails), PROMPTS, **settings)
        assert [output.token_ids for output in found] == [output.token_ids for output in plain]


@pytest.mark.parametrize("rule", [BestOf(5), SpeculativeRejection(6, keep=0.5, segment_size=4)], ids=repr)
def test_where_all_is_judged_a_round_is_one_wave(lm, rule):
    calls = []

    def rm(prompts, answers):
        calls.append(len(answers))
        return spread(prompts, answers)

    settings = dict(seed=1, rule=rule, max_new_tokens=12, eos_token_id=(), width=3, wave=1, progress=False)
    stars_kernels.decode(lm, rm, "ab", tokenizer=byte_tokenizer(), **settings)
    assert max(calls) == 3 and calls.count(1) <= 2  # the empty answer, and a remainder


def test_a_wave_that_runs_out_of_memory_is_a_round_that_is_repeated(lm):
    """The second wave of a round fails once: nothing is counted twice, and the answers are the same."""
    settings = dict(SET, tokenizer=byte_tokenizer(), wave=2)
    plain = stars_kernels.decode(lm, spread, PROMPTS, **settings)
    calls = []

    def rm(prompts, answers):
        calls.append(len(answers))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")
        return spread(prompts, answers)

    with pytest.warns(RuntimeWarning, match="out of memory in a round of 3 prompts x 6 attempts"):
        found = stars_kernels.decode(lm, rm, PROMPTS, **settings)
    assert calls[1] == 6 and calls[2] < 6
    assert [output.token_ids for output in found] == [output.token_ids for output in plain]
    assert [output.counts.attempts for output in found] == [output.counts.attempts for output in plain]
    assert found[0].memory_limits == {"width": 3}


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("kind", ["classifier", "text", "likelihood", "sum"])
def test_memory_that_runs_out_behind_any_wave(lm, monkeypatch, kind):
    """What a wave has read before its round is given up leaves nothing behind."""
    settings = dict(SET, tokenizer=byte_tokenizer(), wave=2)
    rm, real, halved = KINDS[kind](), Round.score, 0
    plain = stars_kernels.decode(lm, rm, PROMPTS, **settings)
    for when in range(1, 14):
        calls = []

        def score(self, wave, calls=calls, when=when):
            calls.append(wave)
            found = real(self, wave)
            if len(calls) == when:
                raise torch.OutOfMemoryError("no room")
            return found

        monkeypatch.setattr(Round, "score", score)
        found = stars_kernels.decode(lm, rm, PROMPTS, **settings)
        halved += found[0].memory_limits == {"width": 3}
        assert [output.token_ids for output in found] == [output.token_ids for output in plain]
        assert [output.reward for output in found] == pytest.approx([output.reward for output in plain], rel=1e-9)
    assert halved > 6


@pytest.mark.parametrize("wave", [0, -1, 1.5, True, None, "all"])
def test_other_waves_are_refused(lm, rm, wave):
    with pytest.raises(ValueError, match=f'wave is {wave!r}, expected an integer >= 1 or "auto"'):
        stars_kernels.decode(lm, rm, [1], wave=wave)
