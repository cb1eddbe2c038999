import pytest
import torch
import torch.nn.functional as F

from stars_kernels.ops import fork_attention
from tests.ops.helpers import DTYPES, assert_no_worse, compiled, dtype_name, generator, longs, strided

# heads, key/value heads, Dk, Dv
SHAPES = [(9, 3, 16, 16), (4, 1, 8, 24), (4, 4, 24, 8), (1, 1, 1, 1)]
VARIANTS = {
    "plain": {},
    "window": {"window": 4},
    "window 1": {"window": 1},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "together": {"window": 6, "softcap": 1.5, "sinks": True},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
steps_1_5 = pytest.mark.parametrize("steps", [1, 5], ids=["S=1", "S=5"])

LENGTHS = (7, 0, 33, 1)  # the second prompt's prefix is empty
PROMPT = (2, 0, 1, 2, 3, 0, 2, 1)  # in no order


def make_case(
    steps=1,
    shape=SHAPES[0],
    dtype=torch.float64,
    lengths=LENGTHS,
    prompt=PROMPT,
    suffix_len=None,
    query_len=None,
    seed=0,
    slots=None,
    **variant,
):
    """Arguments of fork_attention. Prefixes lie out of order; whatever must not be read is NaN."""
    heads, kv_heads, key_size, value_size = shape
    rows, slots, g = len(prompt), slots or max(steps, 6), generator(seed)

    def noise(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    if suffix_len is None:
        suffix_len = torch.randint(1, slots + 1, (rows,), generator=g).tolist()
        suffix_len[:2] = [1, slots]
    if query_len is None:
        query_len = [min(steps, s) for s in suffix_len]
        query_len[2:5] = [0, 1, min(2, query_len[4])]
    offsets, at = [0] * len(lengths), 2
    for p in reversed(range(len(lengths))):
        offsets[p], at = at, at + lengths[p] + 3
    query = noise(rows, steps, heads, key_size)
    keys, values = noise(rows, slots, kv_heads, key_size), noise(rows, slots, kv_heads, value_size)
    arena_key, arena_value = noise(at, kv_heads, key_size), noise(at, kv_heads, value_size)
    unused = torch.ones(at, dtype=torch.bool)
    for offset, length in zip(offsets, lengths, strict=True):
        unused[offset : offset + length] = False
    arena_key[unused] = arena_value[unused] = torch.nan
    for r in range(rows):
        query[r, query_len[r] :] = torch.nan
        keys[r, suffix_len[r] :] = values[r, suffix_len[r] :] = torch.nan
    if variant.get("sinks"):
        variant["sinks"] = noise(heads) + 1
    return {
        "query": query,
        "suffix_key": keys,
        "suffix_value": values,
        "suffix_len": longs(*suffix_len),
        "query_len": longs(*query_len),
        "arena_key": arena_key,
        "arena_value": arena_value,
        "offsets": longs(*offsets),
        "lengths": longs(*lengths),
        "prompt": longs(*prompt),
        "scale": 1.3 * key_size**-0.5,
        **variant,
    }


def row_tensors(case, r, dtype):
    """Row r alone: its queries [Hq, S, Dk], all its keys [Hq, n, Dk] and values [Hq, n, Dv]."""
    p, used = case["prompt"][r], case["suffix_len"][r]
    prefix = slice(case["offsets"][p], case["offsets"][p] + case["lengths"][p])
    query = case["query"][r, : case["query_len"][r]]
    keys = torch.cat((case["arena_key"][prefix], case["suffix_key"][r, :used]))
    values = torch.cat((case["arena_value"][prefix], case["suffix_value"][r, :used]))
    group = query.shape[1] // keys.shape[1]
    return (
        query.to(dtype).transpose(0, 1),
        keys.to(dtype).transpose(0, 1).repeat_interleave(group, dim=0),
        values.to(dtype).transpose(0, 1).repeat_interleave(group, dim=0),
    )


def causal(queries, keys, window=0):
    back = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return (back >= 0) & (back < window) if window else back >= 0


def in_order(a, b):
    """a @ b, the terms of each product added one after the other, as a GPU's multiply-adds are."""
    total = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=a.dtype)
    for i in range(a.shape[-1]):
        total += a[..., i, None] * b[..., i, None, :]
    return total


def eager(case, dtype, product=torch.matmul):
    """Ordinary attention, a row at a time: in `dtype`, its softmax in fp32 or better, as in transformers."""
    query = case["query"]
    out = torch.zeros(*query.shape[:3], case["suffix_value"].shape[3], dtype=dtype)
    softmax_dtype = torch.promote_types(dtype, torch.float32)
    for r in range(query.shape[0]):
        q, k, v = row_tensors(case, r, dtype)
        scores = product(q, k.transpose(1, 2)).to(softmax_dtype) * case["scale"]
        if case.get("softcap"):
            scores = case["softcap"] * torch.tanh(scores / case["softcap"])
        mask = causal(q.shape[1], k.shape[1], case.get("window", 0))
        scores = scores.masked_fill(~mask, -torch.inf)
        if case.get("sinks") is not None:
            sinks = case["sinks"].to(softmax_dtype)[:, None, None].expand(-1, q.shape[1], 1)
            scores = torch.cat((scores, sinks), dim=-1)
        weights = scores.softmax(dim=-1)[..., : k.shape[1]].to(dtype)
        out[r, : q.shape[1]] = (weights @ v).transpose(0, 1)
    return out


def assert_right(case):
    out = fork_attention(**case)
    assert out.dtype == case["query"].dtype
    assert_no_worse(out, eager(case, out.dtype), eager(case, torch.float64))
    padded = torch.arange(out.shape[1]) >= case["query_len"][:, None]
    assert (out[padded] == 0).all()


def test_the_truth_is_torch_attention():
    case = make_case(steps=5)
    truth = eager(case, torch.float64)
    for r in range(len(PROMPT)):
        q, k, v = row_tensors(case, r, torch.float64)
        mask = causal(q.shape[1], k.shape[1])
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=case["scale"])
        torch.testing.assert_close(truth[r, : q.shape[1]], expected.transpose(0, 1))


@variants
@steps_1_5
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_variants(impl, dtype, steps, variant):
    assert_right(make_case(steps=steps, dtype=dtype, **variant))


SCALES = [0.0, -0.7]  # of 0, every key that is seen weighs the same


@variants
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_scale_of_any_sign(impl, dtype, scale, variant):
    """What is hidden stays so."""
    assert_right(make_case(steps=5, dtype=dtype, **variant) | {"scale": scale})


@variants
@shapes
@steps_1_5
def test_head_shapes(impl, steps, shape, variant):
    assert_right(make_case(steps=steps, shape=shape, seed=1, **variant))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_long_prefix(impl, dtype):
    assert_right(make_case(dtype=dtype, shape=(6, 2, 64, 64), lengths=(700, 65), prompt=(0, 1, 0, 0, 1), seed=2))


LAYOUTS = [
    pytest.param({"prompt": (0,) * 8}, id="rows of one prompt"),
    pytest.param({"prompt": (2,), "suffix_len": [3], "query_len": [1]}, id="one row"),
    pytest.param({"prompt": (1, 1), "suffix_len": [1, 1], "query_len": [1, 1]}, id="no prefix, one token"),
    pytest.param({"prompt": (0, 1), "suffix_len": [4, 2], "query_len": [0, 0]}, id="no queries"),
    pytest.param({"prompt": (0, 1), "suffix_len": [0, 0], "query_len": [0, 0]}, id="no suffix"),
    pytest.param({"prompt": (0, 2), "suffix_len": [0, 3], "query_len": [0, 2]}, id="one without suffix"),
    pytest.param({"lengths": (0, 0, 0, 0)}, id="no prefixes"),
    pytest.param({"prompt": (3, 2, 1, 0, 3, 2, 1, 0)}, id="prompts descending"),
]


@variants
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(impl, layout, variant):
    assert_right(make_case(steps=2, **({"seed": 3} | layout), **variant))


def test_a_call_in_steps_equals_one_call(impl):
    """Feeding a suffix token by token gives what scoring it whole gives."""
    case = make_case(steps=6, suffix_len=[6] * 8, query_len=[6] * 8, window=5)
    whole = fork_attention(**case)
    for s in range(6):
        step = case | {
            "query": case["query"][:, s : s + 1],
            "suffix_len": torch.full((8,), s + 1),
            "query_len": torch.ones(8, dtype=torch.int64),
        }
        torch.testing.assert_close(fork_attention(**step)[:, 0], whole[:, s])


def test_a_wide_window_and_a_high_cap_change_nothing(impl):
    case = make_case(steps=3)
    expected = fork_attention(**case)
    torch.testing.assert_close(fork_attention(**case, window=10_000), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(fork_attention(**case, softcap=1e9), expected, rtol=0, atol=1e-6)
    low = torch.full((9,), -1e9, dtype=torch.float64)
    torch.testing.assert_close(fork_attention(**case, sinks=low), expected, rtol=0, atol=1e-14)


def test_zero_rows(impl):
    case = make_case(steps=2, prompt=(), suffix_len=[], query_len=[])
    assert fork_attention(**case).shape == (0, 2, 9, 16)


@variants
def test_strided_inputs(impl, variant):
    case = make_case(steps=3, **variant)
    expected = fork_attention(**case)
    views = {k: strided(v) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    torch.testing.assert_close(fork_attention(**views), expected)


def test_a_rows_bits_do_not_depend_on_its_batch():
    if not compiled("fork_attention"):
        pytest.skip("the definition promises no bits")
    case = make_case(steps=3, shape=(9, 3, 64, 64), dtype=torch.float32, lengths=(200, 0, 65, 1), seed=4)
    whole = fork_attention(**case)
    of_rows = ("query", "suffix_key", "suffix_value", "suffix_len", "query_len", "prompt")
    for rows in ([3], [0, 7], [7, 6, 5, 4, 3, 2, 1, 0]):
        part = fork_attention(**(case | {name: case[name][rows] for name in of_rows}))
        assert torch.equal(part, whole[rows])


def read_in_pieces(tokens, pieces, **variant):
    """The outputs of one call whose rows are pieces (prefix, begin, end): tokens begin to end are its queries.

    tokens: queries, keys and values of one text. Pieces of one prefix share it. What must not be read is NaN.
    """
    query, key, value = tokens
    prefixes, begins, ends = map(list, zip(*pieces, strict=True))
    lengths = sorted(set(prefixes))

    def rows(of, starts):
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        out = of.new_full((len(pieces), max(counts), *of.shape[1:]), torch.nan)
        for row, start, end in zip(out, starts, ends, strict=True):
            row[: end - start] = of[start:end]
        return out, longs(*counts)

    queries, query_len = rows(query, begins)
    keys, suffix_len = rows(key, prefixes)
    out = fork_attention(
        queries, keys, rows(value, prefixes)[0], suffix_len, query_len,
        torch.cat([key[:n] for n in lengths]), torch.cat([value[:n] for n in lengths]),
        longs(0, *lengths[:-1]).cumsum(0), longs(*lengths), longs(*map(lengths.index, prefixes)),
        scale=query.shape[-1] ** -0.5, **variant,
    )  # fmt: skip
    return [row[:n] for row, n in zip(out, query_len, strict=True)]


@pytest.mark.parametrize("variant", [*VARIANTS.values(), {"window": 70}], ids=[*VARIANTS, "window 70"])
@shapes
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_tokens_bits_do_not_depend_on_what_is_prefix(dtype, shape, variant):
    """Nor on how many tokens are read at once, the rows and prompts beside, the order or the threads."""
    if not compiled("fork_attention"):
        pytest.skip("the definition promises no bits")
    g, (heads, kv_heads, key_size, value_size) = generator(5), shape
    sizes = (heads, key_size), (kv_heads, key_size), (kv_heads, value_size)
    tokens = [torch.randn(200, *size, generator=g, dtype=torch.float64).to(dtype) for size in sizes]
    if variant.get("sinks"):
        variant = variant | {"sinks": torch.randn(heads, generator=g).to(dtype)}
    (whole,) = read_in_pieces(tokens, [(0, 0, 200)], **variant)
    assert whole.isfinite().all()

    def check(pieces):
        for found, (prefix, begin, end) in zip(read_in_pieces(tokens, pieces, **variant), pieces, strict=True):
            assert torch.equal(found, whole[begin:end]), f"prefix {prefix}, tokens {begin} to {end}"

    one, some = [], []  # tokens a row
    for end in (1, 2, 30, 63, 64, 65, 90, 127, 128, 129, 192, 200):
        splits = {0, 1, 63, 64, 65, 100, 128, end - 1, end - 20, end - 64, end - 65}
        for prefix in sorted(n for n in splits if 0 <= n < end):
            one.append((prefix, end - 1, end))
            some.append((prefix, int(torch.randint(max(prefix, end - 70), end, (), generator=g)), end))
    for pieces in (one, some):
        for piece in pieces[::9]:
            check([piece])
        check(pieces)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            try:
                check([pieces[i] for i in torch.randperm(len(pieces), generator=g)])
            finally:
                torch.set_num_threads(1)


@pytest.mark.parametrize(("key", "window"), [(62, 10), (65, 6)], ids=["a tile before", "the suffix's tile"])
def test_infinite_values_stay_with_who_sees_them(key, window):
    """The key is inside the first query's window alone, and the last query sees no key of the prefix in its tile."""
    if not compiled("fork_attention"):
        pytest.skip("in the definition a hidden key has weight 0, and 0 * inf is NaN")
    case = make_case(
        steps=6, shape=(1, 1, 4, 4), lengths=(70,), prompt=(0, 0), suffix_len=[6, 1], query_len=[6, 1], window=window
    )
    case["arena_value"][case["offsets"][0] + key] = torch.inf
    out = fork_attention(**case)
    assert out[0, 5].isfinite().all() and not out[:, 0].isfinite().any()


@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
def test_broken_keys_and_values_of_a_row_stay_in_it(broken):
    if not compiled("fork_attention"):
        pytest.skip("the definition promises no bits")
    case = make_case(steps=3, lengths=(70,), prompt=(0,) * 8, suffix_len=[6, 1, 6, 3, 2, 6, 5, 4])
    expected = fork_attention(**case)
    for row in range(8):
        for name in ("suffix_key", "suffix_value"):
            changed = case[name].clone()
            changed[row] = broken
            found = fork_attention(**case | {name: changed})
            others = torch.arange(8) != row
            assert torch.equal(found[others], expected[others])


def test_layers_of_one_arena(impl):
    """As the engine calls it: one layer of the arena [L, 2, N, ..] and of the suffixes [L, 2, R, T, ..]."""
    case = make_case(steps=2, shape=(4, 2, 8, 8))
    arena = torch.full((3, 2, *case["arena_key"].shape), torch.nan, dtype=torch.float64)
    suffix = torch.full((3, 2, *case["suffix_key"].shape), torch.nan, dtype=torch.float64)
    arena[1, 0], arena[1, 1] = case["arena_key"], case["arena_value"]
    suffix[1, 0], suffix[1, 1] = case["suffix_key"], case["suffix_value"]
    sliced = {
        "arena_key": arena[1, 0],
        "arena_value": arena[1, 1],
        "suffix_key": suffix[1, 0],
        "suffix_value": suffix[1, 1],
    }
    assert torch.equal(fork_attention(**(case | sliced)), fork_attention(**case))


ERRORS = [
    ("query", lambda t: t[0], r"query has shape \[1, 9, 16\], expected \[\*, \*, \*, \*\]"),
    ("query", lambda t: t[:, :, :8], "query has 8 heads, expected a multiple of the 3"),
    ("query", lambda t: t.float(), "suffix_key has dtype torch.float64, expected torch.float32"),
    ("suffix_key", lambda t: t[:3], r"suffix_key has shape \[3, 6, 3, 16\], expected \[8, \*, \*, 16\]"),
    ("suffix_value", lambda t: t[:, :2], r"suffix_value has shape \[8, 2, 3, 16\], expected \[8, 6, 3, \*\]"),
    ("suffix_value", lambda t: t.half(), "suffix_value has dtype torch.float16, expected torch.float64"),
    ("arena_key", lambda t: t[..., :4], r"arena_key has shape \[\d+, 3, 4\], expected \[\*, 3, 16\]"),
    ("arena_value", lambda t: t[:-1], r"arena_value has shape \[\d+, 3, 16\], expected \[\d+, 3, 16\]"),
    ("arena_value", lambda t: t.float(), "arena_value has dtype torch.float32, expected torch.float64"),
    ("suffix_len", lambda t: t[:2], r"suffix_len has shape \[2\], expected \[8\]"),
    ("query_len", lambda t: t.int(), "query_len has dtype torch.int32, expected torch.int64"),
    ("prompt", lambda t: t[None], r"prompt has shape \[1, 8\], expected \[8\]"),
    ("lengths", lambda t: t[:2], r"lengths has shape \[2\], expected \[4\]"),
    ("sinks", lambda t: t[:2], r"sinks has shape \[2\], expected \[9\]"),
]


@pytest.mark.parametrize(("name", "change", "message"), ERRORS, ids=[f"{e[0]}-{i}" for i, e in enumerate(ERRORS)])
def test_errors(impl, name, change, message):
    case = make_case(sinks=True)
    fork_attention(**case)
    with pytest.raises(ValueError, match=message):
        fork_attention(**(case | {name: change(case[name])}))


@variants
def test_opcheck(variant):
    case = {"window": 0, "softcap": 0.0, "sinks": None} | make_case(steps=2, shape=(4, 2, 8, 6), **variant)
    order = (
        "query suffix_key suffix_value suffix_len query_len arena_key arena_value offsets lengths prompt "
        "scale window softcap sinks"
    )
    torch.library.opcheck(torch.ops.stars.fork_attention.default, [case[name] for name in order.split()])
