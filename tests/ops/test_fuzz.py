"""What the dispatcher picks equals the definition, on shapes, options and layouts that nobody chose."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import stars_kernels
from stars_kernels.ops import fork_attention, kv_commit, reward_head, segment_sample
from tests.ops.helpers import DTYPES, bits_of, compiled, generator, longs, strided
from tests.ops.test_segment_sample import borderline

fuzz = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.data_too_large])
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)


def tolerance(dtype):
    return {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


def both(op, **arguments):
    with stars_kernels.reference():
        expected = op(**arguments)
    return op(**arguments), expected


@fuzz
@given(
    dtype=dtypes, seed=seeds,
    group=st.integers(1, 5), kv_heads=st.integers(1, 3), key_size=st.integers(1, 70), value_size=st.integers(1, 70),
    lengths=st.lists(st.one_of(st.integers(0, 70), st.sampled_from([63, 64, 65, 128, 200])), min_size=1, max_size=3),
    rows=st.integers(0, 9), steps=st.integers(1, 7), slots=st.integers(0, 70),
    window=st.sampled_from([0, 0, 1, 5, 64, 100]), softcap=st.sampled_from([0.0, 0.0, 3.0]), sinks=st.booleans(),
    spread=st.sampled_from([0.1, 1.0, 8.0]), views=st.booleans(),
)  # fmt: skip
def test_fork_attention(
    dtype, seed, group, kv_heads, key_size, value_size, lengths, rows, steps, slots, window, softcap, sinks, spread,
    views,
):  # fmt: skip
    g = generator(seed)

    def noise(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    def choose(high, count):
        return torch.randint(0, high + 1, (count,), generator=g)

    heads, prompts, slots = group * kv_heads, len(lengths), max(slots, steps)
    suffix_len = choose(slots, rows)
    query_len = torch.minimum(choose(steps, rows), suffix_len)
    offsets, end = [], 3
    for length in lengths:
        offsets.append(end)
        end += length + 2
    arguments = {
        "query": noise(rows, steps, heads, key_size, scale=spread),
        "suffix_key": noise(rows, slots, kv_heads, key_size), "suffix_value": noise(rows, slots, kv_heads, value_size),
        "suffix_len": suffix_len, "query_len": query_len,
        "arena_key": noise(end, kv_heads, key_size), "arena_value": noise(end, kv_heads, value_size),
        "offsets": longs(*offsets), "lengths": longs(*lengths),
        "prompt": torch.randint(0, prompts, (rows,), generator=g),
        "sinks": noise(heads) if sinks else None,
    }  # fmt: skip
    if views:
        arguments = {name: None if t is None else strided(t) for name, t in arguments.items()}
    found, expected = both(
        fork_attention, **arguments, scale=key_size**-0.5, window=window, softcap=softcap
    )  # fmt: skip
    assert found.dtype == expected.dtype and found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=tolerance(dtype), atol=4 * tolerance(dtype))


@fuzz
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=seeds, vocabulary=st.integers(1, 20_000),
    spread=st.sampled_from([0.0, 1.0, 3.0, 30.0]), temperature=st.floats(0.05, 5.0),
    top_k=st.one_of(st.integers(0, 50), st.integers(0, 20_000)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)), min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
    shared=st.booleans(), hidden=st.floats(0, 0.99),
)  # fmt: skip
def test_segment_sample(dtype, seed, vocabulary, spread, temperature, top_k, top_p, min_p, shared, hidden):
    """Where rounding does not decide over a survivor, all draws agree but one that rounding may tip."""
    g = generator(seed)
    logits = (torch.randn(3, vocabulary, generator=g) * spread).to(dtype)
    logits[torch.rand(3, vocabulary, generator=g) < hidden] = -torch.inf
    logits[:, seed % vocabulary] = 1.0
    assume(not borderline(logits.float(), temperature, top_k, top_p, min_p))
    rows = 24
    source = torch.randint(0, 3, (rows,), generator=g)
    if not shared:
        logits, source = logits[source], None
    keys = torch.randint(-(2**62), 2**62, (rows,), generator=g)
    (token, logprob), (expected, expected_logprob) = both(
        segment_sample, logits=logits, keys=keys, attempt=torch.arange(rows), position=torch.arange(rows) * 7,
        source=source, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    same = token == expected
    assert (~same).sum() <= 1
    torch.testing.assert_close(logprob[same], expected_logprob[same], rtol=0, atol=1e-4)


@fuzz
@given(
    dtype=dtypes, seed=seeds, rows=st.integers(0, 9), steps=st.integers(1, 5), size=st.integers(1, 300),
    bias=st.booleans(), norm=st.booleans(), views=st.booleans(),
)  # fmt: skip
def test_reward_head(dtype, seed, rows, steps, size, bias, norm, views):
    g = generator(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    arguments = {
        "hidden": noise(rows, steps, size), "last": torch.randint(0, steps, (rows,), generator=g),
        "weight": noise(size), "bias": noise(1) if bias else None, "norm_weight": noise(size) if norm else None,
    }  # fmt: skip
    if views:
        arguments = {name: None if t is None else strided(t) for name, t in arguments.items()}
    found, expected = both(reward_head, **arguments)
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # sums are wide whatever the storage
    torch.testing.assert_close(found, expected, rtol=tolerance(wide), atol=tolerance(wide) * size**0.5)


@fuzz
@given(
    dtype=dtypes, seed=seeds, layers=st.integers(1, 4), rows=st.integers(1, 6), slots=st.integers(1, 9),
    heads=st.integers(1, 3), size=st.integers(1, 9), prompts=st.integers(1, 4), views=st.booleans(),
)  # fmt: skip
def test_kv_commit(dtype, seed, layers, rows, slots, heads, size, prompts, views):
    g = generator(seed)
    lengths = torch.randint(0, 5, (prompts,), generator=g)
    capacity = 5 + slots
    commits = torch.randperm(prompts, generator=g)
    commits = commits[: seed % (prompts + 1)]
    arguments = {
        "suffix": torch.randn(layers, 2, rows, slots, heads, size, generator=g).to(dtype),
        "offsets": torch.arange(prompts) * capacity,
        "prompt": commits,
        "row": torch.randint(-1, rows, commits.shape, generator=g),
        "count": torch.randint(0, slots + 1, commits.shape, generator=g),
        "advance": torch.randint(0, 2, commits.shape, generator=g).bool(),
    }
    arena = torch.randn(layers, 2, prompts * capacity, heads, size, generator=g).to(dtype)
    written = []
    for forced in (False, True):
        target, moved = (strided(arena), strided(lengths)) if views else (arena.clone(), lengths.clone())
        given_ = {name: strided(t) if views else t for name, t in arguments.items()}
        if forced:
            with stars_kernels.reference():
                kv_commit(arena=target, lengths=moved, **given_)
        else:
            kv_commit(arena=target, lengths=moved, **given_)
        written.append((target, moved))
    (found, found_lengths), (expected, expected_lengths) = written
    assert torch.equal(bits_of(found), bits_of(expected)) and torch.equal(found_lengths, expected_lengths)


# What a definition answers with an IndexError or a wrong slice, a kernel must not answer with another's memory.

ONE_ROW = {
    "query": torch.zeros(1, 1, 2, 4), "suffix_key": torch.zeros(1, 3, 1, 4), "suffix_value": torch.zeros(1, 3, 1, 4),
    "suffix_len": longs(1), "query_len": longs(1),
    "arena_key": torch.zeros(5, 1, 4), "arena_value": torch.zeros(5, 1, 4),
    "offsets": longs(0), "lengths": longs(5), "prompt": longs(0), "scale": 1.0,
}  # fmt: skip
OUT_OF_BOUNDS = [
    ({"prompt": longs(1)}, "prompt: expected 0 to 0, found 1"),
    ({"prompt": longs(-1)}, "prompt: expected 0 to 0, found -1"),
    ({"suffix_len": longs(4)}, "suffix_len: expected 0 to 3, found 4"),
    ({"query_len": longs(2)}, "query_len: expected 0 to 1, found 2"),
    ({"offsets": longs(1)}, r"expected slots of 0 to 5, found 1 \+ 5"),
    ({"offsets": longs(-1)}, r"expected slots of 0 to 5, found -1 \+ 5"),
]


@pytest.mark.parametrize(("change", "message"), OUT_OF_BOUNDS, ids=[m for _, m in OUT_OF_BOUNDS])
def test_fork_attention_refuses_what_lies_outside(change, message):
    if not compiled("fork_attention"):
        pytest.skip("no compiled fork_attention")
    fork_attention(**ONE_ROW)
    with pytest.raises(IndexError, match=message):
        fork_attention(**(ONE_ROW | change))


@pytest.mark.parametrize("last", [-1, 3])
def test_reward_head_refuses_what_lies_outside(last):
    if not compiled("reward_head"):
        pytest.skip("no compiled reward_head")
    with pytest.raises(IndexError, match=f"last: expected 0 to 2, found {last}"):
        reward_head(torch.zeros(1, 3, 4), longs(last), torch.zeros(4))


@pytest.mark.parametrize("source", [-1, 2])
def test_segment_sample_refuses_what_lies_outside(source):
    if not compiled("segment_sample"):
        pytest.skip("no compiled segment_sample")
    one = longs(0)
    with pytest.raises(IndexError, match=f"source: expected 0 to 1, found {source}"):
        segment_sample(torch.zeros(2, 4), one, one, one, source=longs(source))
