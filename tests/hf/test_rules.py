"""Rules given to `decode`: what they decide is in test_exactness.py and decoder/test_distribution.py."""

import pytest

import stars_kernels
from stars_kernels import BestOf, BlockBestOf, Plain, Stars
from tests.hf.test_exactness import PROMPTS

SET = dict(seed=2, max_new_tokens=10, progress=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BestOf(0), "n is 0, expected an integer >= 1"),
        (lambda: BestOf(1.5), "n is 1.5, expected an integer >= 1"),
        (lambda: BestOf(True), "n is True, expected an integer >= 1"),
        (lambda: BestOf(2**24), "n is 16777216, expected less than 16777216"),
        (lambda: BlockBestOf(0), "n is 0, expected an integer >= 1, or a list of them"),
        (lambda: BlockBestOf(()), r"n is \(\), expected an integer >= 1, or a list of them"),
        (lambda: BlockBestOf([4, 0]), r"n is \(4, 0\), expected an integer >= 1, or a list of them"),
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
    assert BestOf(numpy.int64(3)) == BestOf(3) and BlockBestOf([numpy.int64(3), 2]) == BlockBestOf((3, 2))


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
        held.append(self.cache.kv_tokens)
        close(self)

    monkeypatch.setattr(ModelProposer, "close", noted)
    stars_kernels.decode(lm, rm, PROMPTS[0], rule=BestOf(6), width=6, eos_token_id=(), **SET)
    assert held == [len(PROMPTS[0]) + 10 + 6 * 10]
