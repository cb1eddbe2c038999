import itertools
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import stars_kernels
from stars_kernels.ops import segment_sample
from stars_kernels.ops.philox import STREAM_CALIBRATE, STREAM_SAMPLE, request_key, token_bits
from stars_kernels.ops.segment_sample import filter_scores
from tests.chi_square import chi_square
from tests.ops.helpers import generator, longs, strided

NO_FILTER = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
EVERY_FILTER = [
    pytest.param(dict(zip(NO_FILTER, values, strict=True)), id="-".join(map(str, values)))
    for values in itertools.product((1.0, 0.6), (0, 1, 17), (1.0, 0.83), (0.0, 0.07))
]
SOME_FILTERS = [
    pytest.param(NO_FILTER | some, id="-".join(f"{k}={v}" for k, v in some.items()) or "no filter")
    for some in (
        {},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
    )
]


def rows_of(count, seed=0):
    """Keys, attempts and positions of `count` different draws."""
    i = torch.arange(count)
    keys = longs(*(request_key(seed, k) for k in range(4)))
    return keys[i % 4], i // 4 % 5000, i // 20_000


def draw(logits, count, seed=0, **filters):
    """`count` draws from one row of logits."""
    keys, attempt, position = rows_of(count, seed)
    return segment_sample(
        logits[None], keys, attempt, position, source=torch.zeros(count, dtype=torch.int64), **filters
    )


def hf_scores(logits, temperature, top_k, top_p, min_p):
    """The filtered scores in float64, by transformers' own warpers."""
    scores = TemperatureLogitsWarper(temperature)(None, logits.double())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores


def borderline(logits, temperature, top_k, top_p, min_p):
    """Whether a token's cumulative mass lies within 1e-6 of top_p, where rounding decides."""
    before = hf_scores(logits, temperature, top_k, 1.0, 0.0)
    mass = before.softmax(dim=-1).sort(dim=-1, descending=True).values.cumsum(dim=-1)
    return top_p < 1 and bool(((mass - top_p).abs() < 1e-6).any())


def race(scores, bits):
    """The race's keys in float64, of scores as fp32 holds them, and their distances from the largest."""
    v = ((bits.double() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return torch.log(-torch.log1p(-v)) - (scores - scores.amax(dim=-1, keepdim=True)).double()


def assert_winners(token, scores, bits):
    """Each token has the smallest key; another is right only where the two lie within 4 ulp of fp32."""
    keys = race(scores, bits)
    lost_by = keys.gather(1, token[:, None]).squeeze(1) - keys.amin(dim=1)
    near_ties = int((lost_by > 0).sum())
    if near_ties:
        print(f"{near_ties} of {len(token)} tokens decided by rounding")
    assert near_ties <= 1 + len(token) // 10_000
    scale = keys.amin(dim=1).abs().clamp(min=1.0)
    assert (lost_by <= 4 * torch.finfo(torch.float32).eps * scale).all()


def assert_draws(logits, source, filters, keys, attempt, position, token, logprob):
    """Every draw against an independent reference: its support, its probability, its noise."""
    scores = hf_scores(logits, **filters)[source]
    picked = token[:, None]
    assert (token >= 0).all() and (token < logits.shape[1]).all()
    assert scores.gather(1, picked).isfinite().all(), "a token outside the support was drawn"
    # A token wrongly kept or lost would move every other's logprob by its mass.
    expected = scores.log_softmax(dim=-1).gather(1, picked).squeeze(1)
    assert logprob.dtype == torch.float32 and token.dtype == torch.int64
    torch.testing.assert_close(logprob.double(), expected, rtol=0, atol=1e-5)
    fp32_scores = (logits.float() / filters["temperature"])[source]
    fp32_scores = fp32_scores.masked_fill(scores.isinf(), -torch.inf)
    bits = token_bits(keys, logits.shape[1], position, attempt, STREAM_SAMPLE)
    assert_winners(token, fp32_scores, bits)


# --- filters ---


@pytest.mark.parametrize("filters", EVERY_FILTER)
def test_draws_under_filters(impl, filters):
    logits = torch.randn(3, 203, generator=generator(1)) * 2.5
    assert not borderline(logits, **filters)
    source = torch.arange(600) % 3
    keys, attempt, position = rows_of(600)
    token, logprob = segment_sample(logits, keys, attempt, position, source=source, **filters)
    assert_draws(logits, source, filters, keys, attempt, position, token, logprob)


@pytest.mark.parametrize("filters", EVERY_FILTER)
def test_support_of_the_definition(filters):
    logits = torch.randn(64, 1003, generator=generator(2)) * 3
    assert not borderline(logits, **filters)
    expected = hf_scores(logits, **filters).isfinite()
    scores, ids = filter_scores(logits / filters["temperature"], filters["top_k"], filters["top_p"], filters["min_p"])
    if ids is None:
        assert torch.equal(scores.isfinite(), expected)
        return
    assert (ids.sort(dim=-1).values.diff(dim=-1) > 0).all(), "an id came twice"
    assert torch.equal(torch.zeros_like(expected).scatter(1, ids, scores.isfinite()), expected)


TIES = [
    # logits, filters, ids that stay
    pytest.param([3, 2, 2, 2, 1], {"top_k": 2}, [0, 1, 2, 3], id="top-k keeps ties with the k-th"),
    pytest.param([1, 2, 3, 2, 2], {"top_k": 3}, [1, 2, 3, 4], id="top-k keeps later ties"),
    pytest.param([2, 2, 2, 2], {"top_k": 1}, [0, 1, 2, 3], id="top-k of equals"),
    pytest.param([5, -torch.inf, 1, -torch.inf], {"top_k": 3}, [0, 2], id="top-k never keeps -inf"),
    pytest.param([5, 1, 1], {"top_k": 7}, [0, 1, 2], id="top-k beyond the vocabulary"),
    pytest.param([0, 0, 0, 0], {"top_p": 0.6}, [0, 1, 2], id="top-p takes ids ascending"),
    pytest.param([0, 0, 0, 0], {"top_p": 0.4}, [0, 1], id="top-p takes the one that crosses"),
    pytest.param([0, 0, 0, 0], {"top_p": 1e-9}, [0], id="top-p always keeps one"),
    pytest.param([0, 1, 0, 1, 0], {"top_p": 0.8}, [0, 1, 2, 3], id="top-p by probability, then id"),
    pytest.param([0, 1, 1, 1], {"top_k": 2, "top_p": 0.6}, [1, 2], id="top-p cuts what top-k tied"),
    pytest.param([0, 1, 1, 1], {"top_k": 2, "top_p": 0.7}, [1, 2, 3], id="top-p of top-k's mass"),
    pytest.param([0, 0, -1], {"min_p": 0.9}, [0, 1], id="min-p keeps ties with the best"),
    pytest.param([0, -0.6, -0.8], {"min_p": 0.5}, [0, 1], id="min-p"),
]


@pytest.mark.parametrize(("logits", "filters", "stay"), TIES)
def test_ties_in_the_filters(impl, logits, filters, stay):
    logits = torch.tensor(logits, dtype=torch.float32)
    token, logprob = draw(logits, 400, **filters)
    assert token.unique().tolist() == stay
    expected = torch.full_like(logits, -torch.inf).index_copy(0, longs(*stay), logits[stay]).log_softmax(0)
    torch.testing.assert_close(logprob, expected[token], rtol=0, atol=1e-6)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 5),
    vocabulary=st.integers(1, 70),
    spread=st.sampled_from([0.0, 0.1, 1.0, 4.0, 30.0]),
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, 80),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
    definition=st.booleans(),
)
def test_draws_fuzzed(rows, vocabulary, spread, temperature, top_k, top_p, min_p, definition):
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    logits = torch.randn(rows, vocabulary, generator=generator(vocabulary)) * spread
    tied = any(len(set(row)) < vocabulary for row in logits.tolist())
    assume(not borderline(logits, **filters) and not (tied and top_p < 1))
    source = torch.arange(4 * rows) % rows
    keys, attempt, position = rows_of(4 * rows, seed=vocabulary)
    arguments = (logits, keys, attempt, position)
    if definition:
        with stars_kernels.reference():
            out = segment_sample(*arguments, source=source, **filters)
    else:
        out = segment_sample(*arguments, source=source, **filters)
    assert_draws(logits, source, filters, keys, attempt, position, *out)


# --- the distribution ---


@pytest.mark.parametrize("filters", SOME_FILTERS)
def test_chi_square(impl, filters):
    logits = torch.randn(15, generator=generator(3)) * 1.8
    token, _ = draw(logits, 100_000, seed=5, **filters)
    probs = hf_scores(logits[None], **filters)[0].softmax(dim=-1)
    counts = torch.bincount(token, minlength=15)
    stay = probs > 0
    assert counts[~stay].sum() == 0
    assert (probs[stay] * 100_000 > 5).all() and stay.sum() > 2
    assert chi_square(counts[stay], (probs * 100_000)[stay]) > 1e-3


GAP = 18.0
TAIL = 8


def coarse(bits, shift):
    """Bits without their lowest `shift`: the middle of each interval of 2^shift."""
    return (bits >> shift << shift) + (1 << shift >> 1)


def tail_counts(monkeypatch, shift):
    """How often each of 8 tokens beats one that is 18 above it, in 200,000 draws that make such wins common.

    A token wins with probability e^-18: seeing a hundred wins would take 10^10 noises. A win needs bits
    x < 66 * 20, so in each row one tail token draws from x < 2^12 alone, which multiplies its chance by 2^20.
    """
    rows = 200_000
    token = torch.arange(rows) % TAIL

    def few_bits(keys, ids, position, attempt, stream):
        bits = token_bits(keys, ids, position, attempt, stream)
        bits[torch.arange(rows), token] >>= 20
        return coarse(bits, shift)

    monkeypatch.setattr(sys.modules[segment_sample.__module__], "token_bits", few_bits)
    logits = torch.tensor([0.0] * TAIL + [GAP])
    with stars_kernels.reference():
        winner, _ = draw(logits, rows, seed=9)
    assert ((winner == TAIL) | (winner == token)).all()
    return torch.bincount(winner, minlength=TAIL + 1)[:TAIL], rows


def test_tail(monkeypatch):
    counts, rows = tail_counts(monkeypatch, shift=0)
    expected = rows * torch.tensor(-GAP).double().exp().item() * 2**20
    assert expected > 1000
    assert abs(counts.sum().item() - expected) < 4 * expected**0.5
    assert chi_square(counts) > 1e-3


def test_tail_sees_24_bit_uniforms(monkeypatch):
    """The planted fault of the test above: with the low 8 bits gone it must fail."""
    counts, rows = tail_counts(monkeypatch, shift=8)
    expected = rows * torch.tensor(-GAP).double().exp().item() * 2**20
    assert abs(counts.sum().item() - expected) > 8 * expected**0.5


# Real draws of the tail, found by search: (token id, position, attempt) with bits < 64 under this key.
RARE_KEY = 0x5354415253
# fmt: off
RARE = [
    (4, 1, 3532244), (5, 1, 8820487), (4, 1, 16172482), (5, 3, 9372311), (2, 3, 12716058),
    (6, 3, 13013558), (1, 4, 5411975), (5, 5, 6239629), (2, 7, 12115568), (2, 8, 5890246),
    (1, 8, 9750541), (5, 10, 11167938), (4, 10, 14395300), (7, 11, 7678504), (3, 12, 4259640),
    (4, 12, 5404258), (2, 13, 4789824), (4, 14, 7008679), (2, 14, 7562060), (3, 15, 5748663),
    (6, 16, 5830088), (6, 16, 7672122), (6, 17, 5695338), (0, 17, 14788746), (6, 18, 5384557),
    (0, 20, 16227498), (6, 21, 16195254), (2, 22, 4264442), (6, 23, 9371693), (3, 24, 4361026),
    (6, 25, 540640), (7, 25, 6894461), (4, 25, 9179209), (6, 26, 2330247), (4, 26, 6450883),
    (2, 27, 4074645), (7, 27, 4431701), (3, 27, 10558030), (6, 27, 12510685), (4, 28, 6862461),
    (0, 28, 11529407), (7, 29, 1154353), (2, 29, 8317508), (6, 29, 12807565), (6, 30, 13705475),
    (4, 31, 3796505), (1, 31, 4201720), (3, 32, 8181459),
]
# The same with bits >= 2^32 - 64, which are 2^32 in fp32.
TOP = [
    (7, 1, 3912197), (3, 2, 5034636), (5, 3, 14117094), (2, 3, 15662280), (7, 4, 3325574),
    (2, 4, 16169579), (3, 5, 7711160), (6, 5, 15492270), (3, 6, 2228714), (3, 7, 830671),
]
# fmt: on


def test_rare_draws(impl):
    """Tokens 18 below the best, at the few draws where their noise may carry them to a win."""
    ids, position, attempt = torch.tensor(RARE).unbind(1)
    keys = longs(RARE_KEY).expand(len(RARE))
    bits = token_bits(keys, 8, position, attempt, STREAM_SAMPLE)
    assert (bits.gather(1, ids[:, None]) < 64).all()
    logits = torch.zeros(len(RARE), 8)
    logits[torch.arange(len(RARE)), (ids + 3) % 8] = GAP
    token, logprob = segment_sample(logits, keys, attempt, position)
    assert_winners(token, logits, bits)
    torch.testing.assert_close(logprob, logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1))
    wins = token == ids
    assert 10 < wins.sum() < len(RARE) - 10
    with_24_bits = race(logits, coarse(bits, 8)).argmin(dim=1) == ids
    assert (with_24_bits != wins).sum() > 10


@pytest.mark.parametrize("filters", [{}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
def test_top_draws(impl, filters):
    """The largest noise there is keeps a finite key: what is left alone by the filters still wins."""
    ids, position, attempt = torch.tensor(TOP).unbind(1)
    keys, rows = longs(RARE_KEY).expand(len(TOP)), torch.arange(len(TOP))
    assert (token_bits(keys, 8, position, attempt, STREAM_SAMPLE)[rows, ids] >= 2**32 - 64).all()
    logits = torch.full((len(TOP), 8), -9.0 if filters else -torch.inf)
    logits[rows, ids] = 0.0
    token, logprob = segment_sample(logits, keys, attempt, position, **filters)
    assert torch.equal(token, ids) and (logprob == 0).all()


# --- rows ---


@pytest.mark.parametrize("filters", SOME_FILTERS)
def test_source_equals_repeated_logits(impl, filters):
    logits = torch.randn(3, 50, generator=generator(4)) * 2
    source = longs(2, 0, 0, 1, 2, 2, 0)
    rows = rows_of(7)
    shared = segment_sample(logits, *rows, source=source, **filters)
    repeated = segment_sample(logits[source], *rows, **filters)
    assert torch.equal(shared[0], repeated[0])
    torch.testing.assert_close(shared[1], repeated[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("filters", SOME_FILTERS)
def test_rows_do_not_depend_on_batch_mates(impl, filters):
    logits = torch.randn(40, 61, generator=generator(5)) * 2
    logits[3] = 1.0  # ties widen what top-k keeps
    logits[7, 2:] = -torch.inf
    logits[11] = torch.nan
    rows = rows_of(40)
    token, logprob = segment_sample(logits, *rows, **filters)
    order = torch.randperm(40, generator=generator(6))
    shuffled = segment_sample(logits[order], *(t[order] for t in rows), **filters)
    assert torch.equal(shuffled[0], token[order])
    alone = [segment_sample(logits[r : r + 1], *(t[r : r + 1] for t in rows), **filters) for r in range(40)]
    assert torch.equal(torch.cat([t for t, _ in alone]), token)
    torch.testing.assert_close(torch.cat([p for _, p in alone]), logprob, rtol=0, atol=1e-6, equal_nan=True)


def test_deterministic_and_streams_differ(impl):
    logits = torch.zeros(1000)
    token, logprob = draw(logits, 200)
    again = draw(logits, 200)
    assert torch.equal(token, again[0]) and torch.equal(logprob, again[1])
    assert (token != draw(logits, 200, stream=STREAM_CALIBRATE)[0]).sum() > 190
    assert (token != draw(logits, 200, seed=1)[0]).sum() > 190


@pytest.mark.parametrize("filters", SOME_FILTERS)
def test_broken_rows_are_flagged_alone(impl, filters):
    good = torch.randn(5, 33, generator=generator(7))
    rows = rows_of(9)
    expected, expected_logprob = segment_sample(good, *(t[:5] for t in rows), **filters)
    broken = torch.zeros(4, 33)
    broken[0, 20] = torch.nan
    broken[1, 0] = torch.inf
    broken[2] = -torch.inf
    broken[3] = torch.inf
    order = longs(0, 5, 1, 6, 2, 7, 3, 8, 4)
    sources = torch.cat((good, broken))[order]
    token, logprob = segment_sample(sources, *(t[order] for t in rows), **filters)
    assert torch.equal(token[::2], expected)
    torch.testing.assert_close(logprob[::2], expected_logprob, rtol=0, atol=1e-6)
    assert token[1::2].tolist() == [-1] * 4 and logprob[1::2].isnan().all()


@pytest.mark.parametrize("filters", SOME_FILTERS)
def test_few_finite_logits(impl, filters):
    logits = torch.full((2, 500), -torch.inf)
    logits[0, 321] = -4.0
    logits[1, [3, 100, 499]] = torch.tensor([0.0, 0.2, 0.1])
    source = torch.arange(200) % 2
    token, logprob = segment_sample(logits, *rows_of(200), source=source, **filters)
    assert (token[::2] == 321).all() and (logprob[::2] == 0).all()
    assert set(token[1::2].tolist()) == {3, 100, 499}


# Draws in which two tokens have equal noise: (smaller id, larger id, position, attempt), under the same key.
# fmt: off
TIED = [
    (4, 641, 1, 1515375), (5, 640, 1, 3882226), (7, 643, 1, 4907903), (6, 643, 1, 6921731),
    (7, 642, 1, 10036199), (6, 640, 1, 10407063), (4, 640, 1, 10434831), (6, 643, 1, 10843458),
    (5, 641, 1, 12334146), (5, 640, 1, 12953877), (4, 643, 2, 1243185), (4, 643, 2, 2726279),
    (4, 640, 2, 8004130), (7, 641, 2, 13149157),
]
# fmt: on
PAIR_FILTERS = [{}, {"top_k": 2}, {"top_p": 0.99}, {"top_k": 2, "min_p": 0.1}]


def tied_draws():
    """logits [14, 800] whose two largest are equal, and (keys, attempts, positions) in which their keys are, too."""
    smaller, larger, position, attempt = torch.tensor(TIED).unbind(1)
    logits, rows = torch.zeros(len(TIED), 800), torch.arange(len(TIED))
    logits[rows, smaller] = logits[rows, larger] = 40.0
    bits = token_bits(longs(RARE_KEY).expand(len(TIED)), 800, position, attempt, STREAM_SAMPLE)
    v = (bits.float() + 0.5) * 2.0**-32
    assert torch.equal(v[rows, smaller], v[rows, larger])
    return logits, (longs(RARE_KEY).expand(len(TIED)), attempt, position), smaller


@pytest.mark.parametrize("filters", PAIR_FILTERS, ids=str)
def test_equal_keys_go_to_the_smallest_id(impl, filters):
    logits, rows, smaller = tied_draws()
    token, logprob = segment_sample(logits, *rows, **filters)
    assert torch.equal(token, smaller)
    torch.testing.assert_close(logprob.exp(), torch.full((len(TIED),), 0.5))


# The noise is within -23 to 3; an ulp of these logits is 1/16, 8 and 7.6e22.
LARGE = [1e6, -1e6, 1e8, -1e8, 1e30, -1e30]
LARGE_FILTERS = [{}, {"top_k": 5}, {"top_p": 0.999}, {"min_p": 0.1}, {"temperature": 1e-3, "top_k": 5, "min_p": 0.1}]
EQUALS = [3, 100, 300, 301, 700]


def large_logits(value, temperature=1.0):
    """800 logits, the EQUALS among them `value` over the temperature; others far below, or -inf."""
    value *= temperature
    logits = torch.full((800,), value - abs(value) / 10)
    logits[::7] = -torch.inf
    logits[1::7] = -2 * abs(value)
    logits[EQUALS] = value
    return logits


@pytest.mark.parametrize("filters", LARGE_FILTERS, ids=str)
@pytest.mark.parametrize("value", LARGE)
def test_equal_logits_are_drawn_equally_at_any_size(impl, value, filters):
    token, logprob = draw(large_logits(value, filters.get("temperature", 1.0)), 20_000, seed=6, **filters)
    counts = torch.bincount(token, minlength=800)
    assert counts[EQUALS].sum() == 20_000
    assert chi_square(counts[EQUALS]) > 1e-3
    torch.testing.assert_close(logprob.exp(), torch.full((20_000,), 0.2))


def test_an_ulp_of_large_logits_counts(impl):
    """At 1e6 it is 1/16: neighbouring logits are drawn with probabilities 6 % apart."""
    logits = 1e6 + torch.arange(-8, 1) / 16
    token, _ = draw(logits, 100_000, seed=6)
    expected = logits.double().softmax(0) * 100_000
    assert chi_square(torch.bincount(token, minlength=9), expected) > 1e-3


TINY_TOP_P = [1e-300, 1e-50, 1e-46, 1e-40]  # 0 in fp32, but for the last, which is subnormal there


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"min_p": 0.1}, {"top_k": 3, "min_p": 0.1}], ids=str)
@pytest.mark.parametrize("top_p", TINY_TOP_P)
def test_the_smallest_top_p_keeps_the_first_token(impl, top_p, filters):
    logits = torch.randn(4, 300, generator=generator(14))
    logits[1, [17, 50, 299]] = 9.0  # of equals, the smallest id
    logits[2, :-1] = -torch.inf
    logits[3] = 0.0
    source = torch.arange(40) % 4
    token, logprob = segment_sample(logits, *rows_of(40), source=source, top_p=top_p, **filters)
    assert torch.equal(token, logits.argmax(dim=1)[source])
    assert token[1:4].tolist() == [17, 299, 0] and (logprob == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("filters", SOME_FILTERS)
def test_dtypes_equal_fp32_of_the_same_values(impl, dtype, filters):
    logits = (torch.randn(4, 100, generator=generator(8)) * 3).to(dtype)
    token, logprob = segment_sample(logits, *rows_of(4), **filters)
    expected, expected_logprob = segment_sample(logits.float(), *rows_of(4), **filters)
    assert torch.equal(token, expected) and torch.equal(logprob, expected_logprob)


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_the_ends_of_the_temperature(impl, filters):
    logits = torch.tensor([0.0, -1.0, 2.0, 2.0, -torch.inf, -2.0])
    token, logprob = draw(logits, 200, temperature=1e-30, **filters)
    assert set(token.tolist()) <= {2, 3}
    torch.testing.assert_close(logprob.exp(), torch.full((200,), 0.5))
    token, logprob = draw(logits, 200, temperature=1e30, **filters)
    survivors = 5 if filters.get("top_k") is None else 3
    assert len(token.unique()) == survivors and 4 not in token
    torch.testing.assert_close(logprob.exp(), torch.full((200,), 1 / survivors))


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 5, 4097])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.9}], ids=str)
def test_vocabulary_sizes(impl, vocabulary, filters):
    logits = torch.randn(2, vocabulary, generator=generator(vocabulary))
    source = torch.arange(64) % 2
    rows = rows_of(64)
    out = segment_sample(logits, *rows, source=source, **filters)
    assert_draws(logits, source, NO_FILTER | filters, *rows, *out)


@pytest.mark.parametrize("filters", SOME_FILTERS)
def test_zero_rows(impl, filters):
    none = torch.empty(0, dtype=torch.int64)
    for logits, source in ((torch.zeros(0, 9), None), (torch.zeros(3, 9), none)):
        token, logprob = segment_sample(logits, none, none, none, source=source, **filters)
        assert token.shape == logprob.shape == (0,)
        assert token.dtype == torch.int64 and logprob.dtype == torch.float32


@pytest.mark.parametrize("filters", SOME_FILTERS)
def test_strided_inputs(impl, filters):
    logits = torch.randn(6, 37, generator=generator(9)) * 2
    rows = rows_of(6)
    token, logprob = segment_sample(logits, *rows, **filters)
    before = logits.clone()
    for view in (strided(logits), logits.t().contiguous().t()):
        assert not view.is_contiguous()
        out = segment_sample(view, *map(strided, rows), **filters)
        assert torch.equal(out[0], token)
        torch.testing.assert_close(out[1], logprob, rtol=0, atol=1e-6)
    assert torch.equal(logits, before)


# --- the op ---

ERRORS = [
    pytest.param({"logits": torch.zeros(5)}, r"logits has shape \[5\], expected \[4, \*\]", id="logits 1-d"),
    pytest.param({"logits": torch.zeros(3, 5)}, r"shape \[3, 5\], expected \[4, \*\]", id="logits rows"),
    pytest.param({"logits": torch.zeros(4, 0)}, "logits has an empty vocabulary", id="no vocabulary"),
    pytest.param({"logits": torch.zeros(4, 5).int()}, "dtype torch.int32, expected a float", id="logits int"),
    pytest.param({"keys": torch.zeros(4)}, "keys has dtype torch.float32, expected torch.int64", id="keys"),
    pytest.param({"attempt": longs(1)}, r"attempt has shape \[1\], expected \[4\]", id="attempt"),
    pytest.param({"position": longs(1).int()}, r"position has shape \[1\], expected \[4\]", id="position"),
    pytest.param({"source": longs(0)}, r"source has shape \[1\], expected \[4\]", id="source"),
    pytest.param({"temperature": 0.0}, "temperature is 0.0, expected 1e-30 to 1e", id="temperature 0"),
    pytest.param({"temperature": float("nan")}, "temperature is nan, expected 1e-30 to 1e", id="temperature nan"),
    pytest.param({"top_k": -1}, "top_k=-1 .*expected top_k >= 0", id="top_k"),
    pytest.param({"top_p": 0.0}, "top_p=0.0 .*expected .*0 < top_p <= 1", id="top_p 0"),
    pytest.param({"top_p": 1.5}, "top_p=1.5 .*expected .*0 < top_p <= 1", id="top_p above 1"),
    pytest.param({"min_p": 1.0}, "min_p=1.0, expected .*0 <= min_p < 1", id="min_p"),
]


@pytest.mark.parametrize(("wrong", "message"), ERRORS)
def test_errors(impl, wrong, message):
    keys, attempt, position = rows_of(4)
    arguments = {"logits": torch.zeros(4, 5), "keys": keys, "attempt": attempt, "position": position}
    segment_sample(**arguments)
    with pytest.raises(ValueError, match=message):
        segment_sample(**(arguments | wrong))


@pytest.mark.parametrize("filters", [(1.0, 0, 1.0, 0.0), (0.7, 3, 0.9, 0.1)], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_opcheck(filters, shared):
    logits = torch.randn(1 if shared else 4, 10, generator=generator(10))
    source = torch.zeros(4, dtype=torch.int64) if shared else None
    torch.library.opcheck(
        torch.ops.stars.segment_sample.default, (logits, *rows_of(4), source, *filters, STREAM_SAMPLE)
    )
