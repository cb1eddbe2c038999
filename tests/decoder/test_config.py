"""Every setting at the edge of what numbers can be: it works, or it is refused when the config is made."""

import dataclasses
from decimal import Decimal
from fractions import Fraction

import pytest

import stars_kernels
from stars_kernels import StarsConfig
from stars_kernels.decoder.checks import finite

LARGE = (2**31, 2**63, 2**64, 10**400, 10**5000)
COUNTS = ("segment_size", "max_attempts", "max_new_tokens", "width", "batch_size", "calibration_samples")
FLOATS = tuple(
    field.name for field in dataclasses.fields(StarsConfig) if field.type in ("float", "float | None")
)  # the config's annotations are strings
SET = dict(seed=0, reward_threshold=1.0, beta=1.0, max_new_tokens=8, segment_size=4, max_attempts=3)


def size(value):
    """A test's name: pytest cannot write an integer of many thousand digits."""
    return f"{'-' * (value < 0)}2^{value.bit_length() - 1}"


def test_the_settings_that_are_numbers_are_known():
    assert set(FLOATS) == {
        "alpha", "beta", "reward_threshold", "temperature", "top_p", "min_p", "calibration_quantile",
        "calibration_acceptance", "max_time",
    }  # fmt: skip


@pytest.mark.parametrize("name", FLOATS)
def test_a_number_beyond_floats_is_refused(name):
    for sign in (1, -1):
        for value in (10**400, 10**5000, Fraction(10**400, 3), Decimal("1e400"), Decimal("NaN"), Decimal("sNaN")):
            with pytest.raises(ValueError, match=rf"^{name} is .*[\dN].*, expected "):
                StarsConfig(**{name: value.copy_sign(sign) if isinstance(value, Decimal) else sign * value})


def test_the_value_is_named_in_a_line():
    with pytest.raises(ValueError, match=r"^beta is 10000000000\d*\.\.\.\d*0000, expected a finite number > 0$"):
        StarsConfig(beta=10**400)
    with pytest.raises(ValueError, match=r"^beta is <an integer of 16610 bits>, expected a finite number > 0$"):
        StarsConfig(beta=10**5000)
    with pytest.raises(ValueError, match=r"^reward_threshold is Decimal\('1E\+400'\), expected a finite number$"):
        StarsConfig(reward_threshold=Decimal("1e400"))


@pytest.mark.parametrize("kind", [Fraction, Decimal, float])
def test_numbers_of_every_kind_are_floats_then(kind):
    half = kind(1) / kind(2)
    config = StarsConfig(**dict.fromkeys(FLOATS, half))
    assert [(type(value), value) for value in (getattr(config, name) for name in FLOATS)] == [(float, 0.5)] * len(
        FLOATS
    )
    assert StarsConfig(beta=10**300).beta == 1e300


@pytest.mark.parametrize("name", COUNTS)
def test_large_counts_work_or_are_refused(lm, rm, name):
    for value in LARGE:
        try:
            config = StarsConfig(**{**SET, name: value})
        except ValueError as error:
            assert str(error).startswith(f"{name} is ") and "expected less than " in str(error)
            assert name not in ("segment_size", "width", "batch_size")
            continue
        expected = StarsConfig(**SET, eos_token_id=())
        given = stars_kernels.decode(lm, rm, [1, 2], config=config, eos_token_id=())
        if name in ("width", "batch_size"):
            assert given.token_ids == stars_kernels.decode(lm, rm, [1, 2], config=expected).token_ids
        elif name == "segment_size":
            whole = expected.replace(segment_size=8)
            assert given.token_ids == stars_kernels.decode(lm, rm, [1, 2], config=whole).token_ids
        else:
            assert (name, given.finish_reason) == ("max_new_tokens", "context")
    for value in (0, -1, -(2**63), -(10**400), True, 1.0):
        with pytest.raises(ValueError, match=f"^{name} is .*, expected "):
            StarsConfig(**{name: value})


@pytest.mark.parametrize("seed", [2**31, 2**63, 2**64, 10**400, -1, -(2**63), -(10**400)], ids=size)
def test_seeds_of_any_sign(lm, rm, seed):
    answers = [stars_kernels.decode(lm, rm, [1, 2], **{**SET, "seed": s}).token_ids for s in (seed, seed, seed + 1)]
    assert answers[0] == answers[1] != answers[2]


def test_a_seed_that_python_does_not_write_is_refused():
    with pytest.raises(ValueError, match=r"^seed is <an integer of 16610 bits>, expected an integer or None \(of at"):
        StarsConfig(seed=10**5000)


@pytest.mark.parametrize("top_k", [260, 2**31, 2**63, 2**64, 10**400, 10**5000], ids=size)
def test_top_k_from_the_vocabulary_on_is_off(lm, rm, top_k):
    answers = [
        stars_kernels.decode(lm, rm, [1, 2], **SET, top_k=k, eos_token_id=(), temperature=9.0).token_ids
        for k in (top_k, None)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("eos", [2**31, 2**63, 2**64, 10**400, 10**5000, -1, -(2**63), -(10**400)], ids=size)
def test_ends_outside_the_vocabulary_are_refused(lm, rm, eos):
    with pytest.raises(ValueError, match=r"^eos_token_id \S.* is outside the vocabulary, expected 0 to 259$"):
        stars_kernels.decode(lm, rm, [1, 2], **SET, eos_token_id=eos)
    with pytest.raises(ValueError, match=r"token id \S.* is outside the vocabulary, expected 0 to 259$"):
        stars_kernels.decode(lm, rm, [1, eos], **SET)


def test_finite():
    assert [finite(x) for x in (True, "1", None, float("inf"), float("nan"), 10**400)] == [None] * 6
    assert [finite(x) for x in (3, Fraction(1, 4), Decimal("0.5"))] == [3.0, 0.25, 0.5]
