"""Rules given to `decode`: what they decide is in test_exactness.py and decoder/test_distribution.py."""

import pytest
import torch

import stars_kernels
from stars_kernels import BestOf, BlockBestOf, Plain, Stars, StarsConfig, StarsError
from stars_kernels.decoder.rules import Plan, Verdict, best
from tests.hf.test_exactness import EOS_IDS, IDS, PROMPTS
from tests.sequential import sequential_answer
from tests.tiny import byte_tokenizer

SET = dict(seed=2, max_new_tokens=10, progress=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BestOf(0), "n is 0, expected an integer >= 1"),
        (lambda: BestOf(1.5), "n is 1.5, expected an integer >= 1"),
        (lambda: BestOf(True), "n is True, expected an integer >= 1"),
        (lambda: BestOf(2**24), "n is 16777216, expected less than 16777216"),
        (lambda: BlockBestOf(0), "n is 0, expected an integer from 1 to 16777215, or a list of them, one per block"),
        (lambda: BlockBestOf(()), r"n is \(\), expected an integer from 1 to"),
        (lambda: BlockBestOf([4, 0]), r"n is \(4, 0\), expected an integer from 1 to"),
        (lambda: BlockBestOf(2, segment_size=0), "segment_size is 0, expected an integer >= 1"),
        (lambda: Stars(max_attempts=0), "max_attempts is 0, expected an integer >= 1"),
        (lambda: Stars(beta=0.0), "beta is 0.0, expected a finite number > 0"),
        (lambda: Stars(accept="softly"), 'accept is \'softly\', expected "soft" or "hard"'),
    ],
)
def test_settings_of_a_rule(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("rule", ["best-of", 8, BestOf])
def test_what_is_no_rule(lm, rm, rule):
    with pytest.raises(ValueError, match=r"^rule is .*, expected a rule such as BestOf\(8\)$"):
        stars_kernels.decode(lm, rm, [1, 2], rule=rule, **SET)


@pytest.mark.parametrize(("name", "value"), [("segment_size", 4), ("beta", 0.5), ("accept", "hard")])
def test_settings_of_another_rule(lm, rm, name, value):
    with pytest.raises(ValueError, match=rf"^{name} is given beside rule=BestOf\(n=2\), which has its own settings"):
        stars_kernels.decode(lm, rm, [1, 2], rule=BestOf(2), **SET, **{name: value})


def test_numbers_of_any_library():
    numpy = pytest.importorskip("numpy")
    assert BestOf(numpy.int64(3)) == BestOf(3) and BlockBestOf(numpy.int64(3)) == BlockBestOf(3)
    assert BlockBestOf([numpy.int64(3), 2]) == BlockBestOf((3, 2))


def test_what_the_output_tells(lm, rm):
    outputs = stars_kernels.decode(lm, rm, PROMPTS, rule=BestOf(4), eos_token_id=(), **SET)
    for output in outputs:
        (segment,) = output.segments
        assert output.config.rule == BestOf(4) and output.calibration is None
        assert (segment.attempts, segment.outcome) == (4, "best") and output.reward == max(segment.rewards)
        assert output.counts.judged == output.counts.sampled == 40
        assert (output.counts.rejections, output.counts.accepted) == (3, 0)
    (plain,) = stars_kernels.decode(lm, rm, PROMPTS[:1], rule=Plain(), eos_token_id=(), **SET)
    assert plain.counts.judged == 10 and plain.counts.rejections == 0


def test_stars_as_a_rule_is_calibrated(lm, rm):
    flat = stars_kernels.decode(lm, rm, PROMPTS, **SET, segment_size=3)
    given = stars_kernels.decode(lm, rm, PROMPTS, **SET, rule=Stars(segment_size=3))
    assert [output.token_ids for output in flat] == [output.token_ids for output in given]
    used = given[0].config.rule
    assert (used.reward_threshold, used.beta) == (flat[0].config.reward_threshold, flat[0].config.beta)
    assert given[0].calibration.rewards == flat[0].calibration.rewards


def test_a_best_of_n_streams_whole_answers(lm, rm):
    events = list(stars_kernels.stream(lm, rm, PROMPTS[:2], rule=BestOf(3), **SET))
    assert sorted(event.index for event in events) == [0, 1] and all(event.output is not None for event in events)


def test_memory_of_a_best_of_n(lm, rm, monkeypatch):
    """Its rows need n * max_new_tokens tokens of keys and values a slot, beside the prefix, and no more."""
    from stars_kernels.hf.proposing.proposer import ModelProposer

    held, close = [], ModelProposer.close

    def noted(self):
        if hasattr(self, "cache"):  # it is closed before it takes memory, too
            held.append(self.cache.kv_tokens)
        close(self)

    monkeypatch.setattr(ModelProposer, "close", noted)
    stars_kernels.decode(lm, rm, PROMPTS[0], rule=BestOf(6), width=6, eos_token_id=(), **SET)
    assert held == [len(PROMPTS[0]) + 10 + 6 * 10]


class Rule:
    """A rule of a user's, of attempts at blocks of four tokens."""

    def plan(self, answer):
        return Plan(4, 3)

    def judge(self, answer, candidates):
        return Verdict(best(candidates), "best" if len(candidates) == 3 else None)


class SecondBest(Rule):
    """Goes back to a candidate that was not the best when the next one came."""

    def judge(self, answer, candidates):
        if len(candidates) < 3:
            return super().judge(answer, candidates)
        ordered = sorted(range(3), key=lambda i: candidates[i].reward)
        return Verdict(ordered[1], "best")


class NeverTakes(Rule):
    def judge(self, answer, candidates):
        return Verdict(best(candidates), None)


class FailsLate(Rule):
    def plan(self, answer):
        if answer.decided:
            raise KeyError("no plan for a second block")
        return super().plan(answer)


class Shrinks(Rule):
    """Whose later segments are shorter, each prompt's in its own time."""

    def plan(self, answer):
        return Plan(6 if len(answer.tokens) < 6 else 3, 2 + answer.decided % 2)

    def judge(self, answer, candidates):
        return Verdict(best(candidates), "best" if len(candidates) == self.plan(answer).attempts else None)


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (NeverTakes(), "attempt 2: the rule took none of the 3 attempts that it planned"),
        (FailsLate(), "segment 1: the batch failed: KeyError: 'no plan for a second block'"),
    ],
)
def test_a_rule_that_fails_ends_its_answers_alone(lm, rm, rule, message, width):
    with pytest.raises(StarsError) as failed:
        stars_kernels.decode(lm, rm, PROMPTS, rule=rule, width=width, eos_token_id=(), **SET)
    assert len(failed.value.errors) == len(PROMPTS)
    assert all(message in str(error) for error in failed.value.errors.values())


def test_a_rule_that_goes_back_is_refused_at_every_width(lm, rm):
    """What it goes back to is not kept: an answer would depend on the width."""
    messages = set()
    for width in (1, 2, 3):
        with pytest.raises(RuntimeError, match=r"the rule chose attempt \d, expected 2, the newest") as failed:
            stars_kernels.decode(
                lm, lambda prompts, answers: [float(len(set(a))) for a in answers], [40], rule=SecondBest(),
                width=width, eos_token_id=(), tokenizer=byte_tokenizer(), **SET,
            )  # fmt: skip
        messages.add(str(failed.value))
    assert len(messages) == 1


@pytest.mark.parametrize("reward", ["model", "head"])
@pytest.mark.parametrize("width", [1, 2, "auto"])
def test_plans_of_several_sizes(lm, rm, reward, width):
    """In one batch, with a reward model and with a head on the language model's own states."""
    head = torch.nn.Linear(24, 1).double()
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))

    def own(prompt, answer):
        states = lm.model(torch.tensor([prompt + answer])).last_hidden_state
        return head(states)[0, -1, 0].item()

    config = StarsConfig(seed=4, rule=Shrinks(), max_new_tokens=20, eos_token_id=EOS_IDS, width=width)
    with torch.no_grad():
        outputs = stars_kernels.decode(lm, rm if reward == "model" else head, PROMPTS, config=config, request_ids=IDS)
        for prompt, id_, output in zip(PROMPTS, IDS, outputs, strict=True):
            expected = sequential_answer(lm, rm if reward == "model" else own, prompt, id_, config, EOS_IDS)
            assert output.token_ids == expected.tokens
            assert [s.attempts for s in output.segments] == [s.attempts for s in expected.segments]
