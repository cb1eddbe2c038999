import pytest
import torch
import triton
import triton.language as tl

from stars_kernels.ops.philox import STREAM_CALIBRATE, STREAM_SAMPLE, token_bits
from stars_kernels.ops.segment_sample import segment_sample_ref
from stars_kernels.ops.triton import philox
from stars_kernels.ops.triton import segment_sample as kernels
from stars_kernels.ops.triton.segment_sample import segment_sample_triton
from tests.chi_square import chi_square
from tests.ops.helpers import bits_of, dtype_name, generator, longs
from tests.ops.test_philox import BIG_KEYS, KNOWN_ANSWERS, words
from tests.ops.test_segment_sample import (
    EQUALS,
    EVERY_FILTER,
    LARGE,
    NO_FILTER,
    PAIR_FILTERS,
    RARE,
    RARE_KEY,
    SOME_FILTERS,
    TIES,
    TINY_TOP_P,
    TOP,
    borderline,
    hf_scores,
    large_logits,
    race,
    rows_of,
    tied_draws,
)

some_filters = pytest.mark.parametrize("filters", SOME_FILTERS)
ALL_FILTERS = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02}


@pytest.fixture
def small(monkeypatch):
    """A vocabulary of a thousand then has several chunks, many groups, and more candidates than a buffer or a tile."""
    for name, value in (("CHUNK", 256), ("GROUP", 8), ("CAPACITY", 256), ("TILE", 128)):
        monkeypatch.setattr(kernels, name, value)


def draw(device, logits, rows, source=None, stream=STREAM_SAMPLE, **filters):
    """The kernels' token and logprob; `rows`: keys, attempts, positions."""
    inputs = (None if t is None else t.to(device) for t in (logits, *rows, source))
    token, logprob = segment_sample_triton(*inputs, *(NO_FILTER | filters).values(), stream)
    assert token.dtype == torch.int64 and logprob.dtype == torch.float32
    return token.cpu(), logprob.cpu()


def assert_as_defined(device, logits, rows, source=None, **filters):
    """Tokens of the definition, but where rounding decides a near tie of the race; its logprobs."""
    filters = NO_FILTER | filters
    token, logprob = draw(device, logits, rows, source, **filters)
    expected, expected_logprob = segment_sample_ref(logits, *rows, source, *filters.values(), STREAM_SAMPLE)
    differ = (token != expected).nonzero()[:, 0]
    if len(differ):
        print(f"{len(differ)} of {len(token)} tokens decided by rounding")
        assert (token[differ] >= 0).all() and (expected[differ] >= 0).all()
        keys, attempt, position = (t[differ] for t in rows)
        scores = logits.float()[differ if source is None else source[differ]] / filters["temperature"]
        noisy = race(scores, token_bits(keys, logits.shape[1], position, attempt, STREAM_SAMPLE))
        mine, other = (noisy.gather(1, t[differ, None]) for t in (token, expected))
        ulp = torch.finfo(torch.float32).eps * other.abs().clamp(min=1.0)
        assert ((mine - other).abs() <= 4 * ulp).all()
    same = token == expected
    torch.testing.assert_close(logprob[same], expected_logprob[same], rtol=0, atol=1e-5, equal_nan=True)
    return token, logprob


# --- noise ---


@triton.jit
def _philox(counter, key, out):
    c0, c1, c2, c3 = tl.load(counter), tl.load(counter + 1), tl.load(counter + 2), tl.load(counter + 3)
    w0, w1, w2, w3 = philox.philox4x32(
        c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32),
        tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32),
    )  # fmt: skip
    tl.store(out, w0.to(tl.int64))
    tl.store(out + 1, w1.to(tl.int64))
    tl.store(out + 2, w2.to(tl.int64))
    tl.store(out + 3, w3.to(tl.int64))


@triton.jit
def _token_bits(keys, ids, position, attempt, stream, out, COUNT: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, COUNT)
    bits = philox.token_bits(
        tl.load(ids + at), tl.load(keys + row), tl.load(position + row), tl.load(attempt + row), stream
    )  # fmt: skip
    tl.store(out + row * COUNT + at, bits.to(tl.int64))


@triton.jit
def _noise(bits, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, philox.noise(tl.load(bits + at).to(tl.uint32)))


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_known_answers(device, counter, key, output):
    out = torch.zeros(4, dtype=torch.int64, device=device)
    _philox[(1,)](longs(*words(counter)).to(device), longs(*words(key)).to(device), out)
    assert out.tolist() == words(output)


def test_token_bits(device):
    rows = len(BIG_KEYS)
    position, attempt = longs(0, 1, 2**31, 2**32 - 1, 77, 5), longs(0, 1, 2**24 - 1, 3, 2**23, 9)
    ids = longs(0, 1, 2, 3, 63, 128_255, 2**31 - 1, 7)
    out = torch.zeros(rows, 8, dtype=torch.int64, device=device)
    for stream in (STREAM_SAMPLE, STREAM_CALIBRATE, 255):
        given = (t.to(device) for t in (BIG_KEYS, ids.int(), position, attempt))
        _token_bits[(rows,)](*given, stream, out, COUNT=8)
        assert torch.equal(out.cpu(), token_bits(BIG_KEYS, ids.expand(rows, -1), position, attempt, stream))


def test_noise(device):
    """Within two ulp of the truth: at both ends, where the logarithms change branch, and between."""
    edges = (torch.tensor([0.25, 0.29289, 0.5, 0.64645, 0.75, 1.0]) * 2.0**32).long()[:, None] + torch.arange(-64, 64)
    powers = 2 ** torch.arange(32)
    uniform = torch.randint(2**32, (3200,), generator=generator(0))
    bits = torch.cat((torch.arange(64), edges.flatten().clamp(max=2**32 - 1), powers, uniform))
    assert len(bits) == 4064
    bits = torch.cat((bits, bits[:32]))
    out = torch.zeros(len(bits), device=device)
    _noise[(1,)](bits.to(device), out, COUNT=len(bits))
    v = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    truth = torch.log(-torch.log1p(-v.double()))
    # Where log(w) crosses 0, one ulp of w is the measure.
    ulp = torch.finfo(torch.float32).eps * truth.abs().clamp(min=1.0)
    assert ((out.cpu().double() - truth).abs() <= 2 * ulp).all()


@pytest.mark.parametrize("filters", [{}, {"min_p": 1e-9}], ids=str)
def test_rare_draws(device, filters):
    """Tokens 18 below the best, at the few draws where their noise may carry them to a win."""
    ids, position, attempt = torch.tensor(RARE).unbind(1)
    rows = (longs(RARE_KEY).expand(len(RARE)), attempt, position)
    logits = torch.zeros(len(RARE), 8)
    logits[torch.arange(len(RARE)), (ids + 3) % 8] = 18.0
    token, _ = assert_as_defined(device, logits, rows, **filters)
    assert 10 < (token == ids).sum() < len(RARE) - 10


@pytest.mark.parametrize("filters", [{}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
def test_top_draws(device, filters):
    """The largest noise there is keeps a finite key: what is left alone by the filters still wins."""
    ids, position, attempt = torch.tensor(TOP).unbind(1)
    logits = torch.full((len(TOP), 8), -9.0 if filters else -torch.inf)
    logits[torch.arange(len(TOP)), ids] = 0.0
    token, logprob = draw(device, logits, (longs(RARE_KEY).expand(len(TOP)), attempt, position), **filters)
    assert torch.equal(token, ids) and (logprob == 0).all()


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}], ids=str)
def test_chi_square(device, filters):
    count = 120
    logits = torch.tensor([[0.3, -1.0, 1.2, 0.0, -torch.inf]])
    token, _ = draw(device, logits, rows_of(count, seed=5), torch.zeros(count, dtype=torch.int64), **filters)
    expected = hf_scores(logits, **(NO_FILTER | filters))[0].softmax(dim=-1) * count
    counts = torch.bincount(token, minlength=5)
    assert counts[expected == 0].sum() == 0 and (expected > 0).sum() > 1
    assert chi_square(counts[expected > 0], expected[expected > 0]) > 1e-3


# --- filters ---


@pytest.mark.parametrize("filters", EVERY_FILTER)
def test_draws_under_filters(device, filters):
    logits = torch.randn(2, 203, generator=generator(1)) * 2.5
    assert not borderline(logits, **filters)
    assert_as_defined(device, logits, rows_of(3), longs(0, 1, 0), **filters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 20},
        {"top_k": 250},  # more than there are groups: the bound is lost
        {"top_p": 0.6},
        {"top_p": 0.99},  # more survivors than a buffer holds
        {"min_p": 0.05},
        {"min_p": 1e-4},
        ALL_FILTERS,
        {"top_k": 300, "top_p": 0.95, "min_p": 0.01},
    ],
    ids=str,
)
def test_chunks_groups_and_full_buffers(device, small, dtype, filters):
    logits = (torch.randn(2, 1003, generator=generator(2)) * torch.tensor([[3.0], [1.2]])).to(dtype)
    assert not borderline(logits.float(), **(NO_FILTER | filters))
    assert_as_defined(device, logits, rows_of(2), **filters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("filters", [{}, {"top_k": 50}, {"top_p": 0.9}, ALL_FILTERS], ids=str)
def test_a_large_vocabulary(device, dtype, filters):
    """With the constants that are shipped: three chunks, the last one not full."""
    logits = (torch.randn(2, 5003, generator=generator(3)) * 4).to(dtype)
    assert not borderline(logits.float(), **(NO_FILTER | filters))
    assert_as_defined(device, logits, rows_of(2), **filters)


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 65, 257])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_vocabulary_sizes(device, small, vocabulary, filters):
    logits = torch.randn(2, vocabulary, generator=generator(vocabulary))
    assert not borderline(logits, **(NO_FILTER | filters))
    assert_as_defined(device, logits, rows_of(2), **filters)


@pytest.mark.parametrize(("logits", "filters", "stay"), TIES)
@pytest.mark.parametrize("capacity", [8192, 1], ids=["candidates", "row"])
def test_ties_in_the_filters(device, monkeypatch, capacity, logits, filters, stay):
    """The logprob of a draw tells the mass of all that stay."""
    monkeypatch.setattr(kernels, "CAPACITY", capacity)
    logits = torch.tensor([logits], dtype=torch.float32)
    token, logprob = draw(device, logits, rows_of(3), torch.zeros(3, dtype=torch.int64), **filters)
    assert set(token.tolist()) <= set(stay)
    alone = torch.full_like(logits[0], -torch.inf).index_copy(0, longs(*stay), logits[0, stay])
    torch.testing.assert_close(logprob, alone.log_softmax(0)[token], rtol=0, atol=1e-6)


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}], ids=str)
@pytest.mark.parametrize("value", [-0.0, -3.0, 1e9])
def test_equal_logits(device, small, filters, value):
    """All tokens tie: no bound keeps them out of the buffer."""
    logits = torch.full((2, 403), value)
    logits[1, ::2] = -torch.inf
    assert_as_defined(device, logits, rows_of(2), **filters)


@pytest.mark.parametrize("filters", PAIR_FILTERS, ids=str)
@pytest.mark.parametrize("capacity", [256, 1], ids=["candidates", "row"])
def test_equal_keys_go_to_the_smallest_id(device, small, monkeypatch, capacity, filters):
    """Of two tokens, in two chunks."""
    monkeypatch.setattr(kernels, "CAPACITY", capacity)
    logits, rows, smaller = tied_draws()
    logits, rows, smaller = logits[:5], [t[:5] for t in rows], smaller[:5]
    token, logprob = draw(device, logits, rows, **filters)
    assert torch.equal(token, smaller)
    torch.testing.assert_close(logprob.exp(), torch.full((5,), 0.5))


@pytest.mark.parametrize(
    ("value", "filters"),
    [(value, {}) for value in LARGE] + [(1e6, {"top_k": 5}), (-1e30, {"min_p": 0.1})],
    ids=str,
)
def test_equal_logits_are_drawn_equally_at_any_size(device, small, value, filters):
    """In several chunks; one of them is all -inf, and one's largest logit is far below the row's."""
    count = 24
    logits = large_logits(value)[None]
    logits[0, 304:512] = -torch.inf
    logits[0, 512:700] = value - abs(value) / 2
    source = torch.zeros(count, dtype=torch.int64)
    token, logprob = assert_as_defined(device, logits, rows_of(count, seed=6), source, **filters)
    counts = torch.bincount(token, minlength=800)[EQUALS]
    assert counts.sum() == count and chi_square(counts) > 1e-3
    torch.testing.assert_close(logprob.exp(), torch.full((count,), 0.2))


@pytest.mark.parametrize("filters", [{}, {"top_k": 3, "min_p": 0.1}], ids=str)
@pytest.mark.parametrize("top_p", TINY_TOP_P)
@pytest.mark.parametrize("capacity", [256, 1], ids=["candidates", "row"])
def test_the_smallest_top_p_keeps_the_first_token(device, small, monkeypatch, capacity, top_p, filters):
    monkeypatch.setattr(kernels, "CAPACITY", capacity)
    logits = torch.randn(2, 300, generator=generator(14))
    logits[1, [17, 50, 299]] = 9.0
    token, logprob = assert_as_defined(device, logits, rows_of(2), top_p=top_p, **filters)
    assert token.tolist() == [logits[0].argmax().item(), 17] and (logprob == 0).all()


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_the_ends_of_the_temperature(device, filters):
    logits = torch.tensor([[0.0, -1.0, 2.0, 2.0, -torch.inf, -2.0]])
    for temperature in (1e-30, 1e30):
        rows, source = rows_of(4), torch.zeros(4, dtype=torch.int64)
        assert_as_defined(device, logits, rows, source, temperature=temperature, **filters)
    broken = torch.tensor([[1e10, 0.0, 0.0, 0.0, 0.0, 0.0]])  # over 1e-30: +inf
    token, logprob = draw(device, broken, rows_of(1), temperature=1e-30, **filters)
    assert token.tolist() == [-1] and logprob.isnan().all()


# --- searches ---


@triton.jit
def _search(scores, count, best, wanted, out, MASS: tl.constexpr, TILE: tl.constexpr):
    low = tl.full([], kernels.LOWEST, tl.float32)
    found = kernels._threshold(scores, count, 1.0, low, tl.load(best), tl.load(wanted + tl.program_id(0)), MASS, TILE)
    tl.store(out + tl.program_id(0), found)


@pytest.mark.parametrize("spread", [1e-3, 30.0, 1e37])
def test_a_search_finds_the_threshold_of_any_weight(device, spread):
    """Among all 32-bit patterns, with ties, zeros of both signs and -inf; a threshold of mass is itself a score."""
    scores = torch.randn(150, generator=generator(21)).mul(spread)
    scores[20:60] = scores[60:100]
    scores[100:103] = torch.tensor([0.0, -0.0, -torch.inf])
    order = scores.sort(descending=True).values[:-1]
    wanted = torch.tensor([1, 2, 30, 77, 149])

    def search(wanted, mass):
        out = torch.empty(len(wanted), device=device)
        given = (t.to(device) for t in (scores, order[:1], wanted))
        scores_, best, weights = given
        _search[(len(wanted),)](scores_, len(scores), best, weights, out, MASS=mass, TILE=64)
        return out.cpu()

    kth = order[wanted - 1]
    reached = (scores >= search(wanted, False)[:, None]).sum(dim=1)
    assert torch.equal(reached, (scores >= kth[:, None]).sum(dim=1))
    masses = (scores.double() - order[0].double()).exp().mul(2.0**40)
    above = torch.stack([masses[scores >= t].sum() for t in kth])
    heavy = masses[[scores.tolist().index(t) for t in kth.tolist()]] > 2.0**20  # rounding decides about the others
    half = masses[[scores.tolist().index(t) for t in kth.tolist()]] / 2
    assert heavy.any()
    assert torch.equal(search((above - half).long(), True)[heavy], kth[heavy])


# --- rows ---


@some_filters
def test_broken_rows_are_flagged_alone(device, small, filters):
    logits = torch.randn(7, 300, generator=generator(7)) * 3
    logits[1, 290] = torch.nan
    logits[2, 0] = torch.inf
    logits[3] = -torch.inf
    logits[4] = torch.inf
    logits[5] = torch.nan
    token, logprob = assert_as_defined(device, logits, rows_of(7), **filters)
    assert ((token < 0) == logprob.isnan()).all() and (token < 0).tolist() == [False] + 5 * [True] + [False]


@some_filters
def test_few_finite_logits(device, small, filters):
    logits = torch.full((2, 500), -torch.inf)
    logits[0, 321] = -4.0
    logits[1, [3, 100, 499]] = torch.tensor([0.0, 0.2, 0.1])
    token, logprob = assert_as_defined(device, logits, rows_of(6), torch.arange(6) % 2, **filters)
    assert (token[::2] == 321).all() and (logprob[::2] == 0).all()
    assert set(token[1::2].tolist()) <= {3, 100, 499}


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.8}, ALL_FILTERS], ids=str)
def test_a_rows_bits_do_not_depend_on_its_batch(device, small, filters):
    logits = torch.randn(4, 300, generator=generator(5)) * 3
    logits[1] = 1.0
    logits[2] = torch.nan
    rows, source = rows_of(5), longs(0, 1, 2, 3, 3)
    token, logprob = draw(device, logits, rows, source, **filters)
    for r in range(5):
        alone = draw(device, logits[source[r : r + 1]], [t[r : r + 1] for t in rows], **filters)
        assert torch.equal(alone[0], token[r : r + 1])
        assert torch.equal(bits_of(alone[1]), bits_of(logprob[r : r + 1]))


@pytest.mark.parametrize("filters", [{}, ALL_FILTERS], ids=str)
def test_strided_inputs(device, small, filters):
    logits = torch.randn(3, 300, generator=generator(9)) * 3
    rows = rows_of(3)
    expected = draw(device, logits, rows, **filters)

    wide, padded = torch.full((3, 777), 50.0, device=device), torch.full((6,), 99, device=device)
    wide[:, 5:305] = logits.to(device)
    spaced = []
    for t in rows:
        spaced.append(padded.clone()[::2])
        spaced[-1].copy_(t)
    for view in (wide[:, 5:305], wide[:, 5:305].t().contiguous().t()):  # strides (777, 1) and (1, 3)
        token, logprob = segment_sample_triton(view, *spaced, None, *(NO_FILTER | filters).values(), STREAM_SAMPLE)
        assert torch.equal(token.cpu(), expected[0]) and torch.equal(logprob.cpu(), expected[1])


@some_filters
def test_zero_rows(device, filters):
    none = torch.empty(0, dtype=torch.int64)
    for logits, source in ((torch.zeros(0, 9), None), (torch.zeros(3, 9), none)):
        token, logprob = draw(device, logits, (none, none, none), source, **filters)
        assert token.shape == logprob.shape == (0,)
    assert_as_defined(device, torch.zeros(1, 9), rows_of(1), **filters)


@some_filters
def test_float64_logits_run_the_definition(device, launches, filters):
    logits = torch.randn(2, 40, generator=generator(8)).double()
    expected = segment_sample_ref(logits, *rows_of(2), None, *filters.values(), STREAM_SAMPLE)
    token, logprob = draw(device, logits, rows_of(2), **filters)
    assert torch.equal(token, expected[0]) and torch.equal(logprob, expected[1])
    assert not launches
    assert_as_defined(device, logits.float(), rows_of(2), **filters)


@some_filters
def test_launches(device, launches, monkeypatch, filters):
    """Two without a filter, else four; the host reads nothing of the device, so that a CUDA graph can hold them."""
    logits, rows = torch.randn(2, 70, generator=generator(10)).to(device), [t.to(device) for t in rows_of(2)]

    def refuse(self, *args):
        raise AssertionError("the host waited for the device")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, refuse)
        segment_sample_triton(logits, *rows, None, *filters.values(), STREAM_SAMPLE)
    filtered = filters | {"temperature": 1.0} != NO_FILTER
    assert launches == (["_groups", "_bound", "_gather", "_draw"] if filtered else ["_race", "_finish"])


def test_streams_differ(device):
    logits, rows = torch.zeros(20, 100), rows_of(20)
    streams = [draw(device, logits, rows, stream=stream)[0] for stream in (STREAM_SAMPLE, 1, STREAM_CALIBRATE)]
    assert (streams[0] != streams[1]).sum() > 15 and (streams[0] != streams[2]).sum() > 15
