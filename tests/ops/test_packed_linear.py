import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stars_kernels.ops import pack_linear, packed_linear, packed_swiglu
from tests.ops.helpers import compiled, dtype_name, generator, strided

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)


def make_case(rows=5, columns=37, depth=23, bias=True, seed=0):
    g = generator(seed)
    weight = torch.randn(columns, depth, generator=g)
    return torch.randn(rows, depth, generator=g), weight, torch.randn(columns, generator=g) if bias else None


def test_where_a_weight_goes():
    weight = make_case()[1]
    packed = pack_linear(weight)
    assert packed.shape == (3, 23, 16) and packed.is_contiguous()
    for n in range(37):
        assert torch.equal(packed[n // 16, :, n % 16], weight[n])
    assert (packed[2, :, 5:] == 0).all()


@dtypes
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows", [*range(0, 18), 40])
@pytest.mark.parametrize(("columns", "depth"), [(1, 1), (16, 8), (37, 23), (48, 64), (130, 576)])
def test_equals_linear(impl, dtype, columns, depth, rows, bias):
    x, weight, bias = make_case(rows, columns, depth, bias)
    found = packed_linear(x, pack_linear(weight, dtype), columns, bias=bias)
    assert found.shape == (rows, columns) and found.dtype == torch.float32
    x, weight = x.double(), weight.to(dtype).double()
    truth = F.linear(x, weight, None if bias is None else bias.double())
    # A sum in ascending order errs by about sqrt(depth) roundings of the terms' sizes.
    terms = F.linear(x.abs(), weight.abs(), None if bias is None else bias.double().abs())
    assert ((found - truth).abs() <= torch.finfo(torch.float32).eps * (1 + depth**0.5) * terms).all()


@dtypes
def test_shapes_and_strides(impl, dtype):
    x, weight, bias = make_case(rows=24)
    packed = pack_linear(weight, dtype)
    flat = packed_linear(x, packed, 37, bias=bias)
    torch.testing.assert_close(packed_linear(x.view(2, 3, 4, 23), packed, 37, bias=bias), flat.view(2, 3, 4, 37))
    torch.testing.assert_close(packed_linear(strided(x), packed, 37, bias=strided(bias)), flat)
    torch.testing.assert_close(packed_linear(x[3], packed, 37, bias=bias), flat[3])
    assert packed_linear(x.new_empty(0, 7, 23), packed, 37).shape == (0, 7, 37)


@dtypes
def test_a_rows_bits_do_not_depend_on_its_batch(dtype):
    x, weight, bias = make_case(rows=33, columns=200, depth=300)
    packed = pack_linear(weight, dtype)
    if not compiled("packed_linear"):
        pytest.skip("the definition promises no bits")
    whole = packed_linear(x, packed, 200, bias=bias)
    for rows in (1, 2, 5, 8, 9, 20):
        parts = [packed_linear(part, packed, 200, bias=bias) for part in x.split(rows)]
        assert torch.equal(torch.cat(parts), whole)


def test_nan_stays_in_its_row(impl):
    x, weight, bias = make_case(rows=9)
    x[4, 7] = torch.nan
    found = packed_linear(x, pack_linear(weight), 37, bias=bias)
    assert found[4].isnan().all() and found[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.integers(0, 30), columns=st.integers(1, 150), depth=st.integers(1, 90), bias=st.booleans())
def test_fuzzed(rows, columns, depth, bias):
    x, weight, bias = make_case(rows, columns, depth, bias, seed=rows)
    found = packed_linear(x, pack_linear(weight), columns, bias=bias)
    torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


ERRORS = [
    (0, lambda x: x.double(), "x has dtype torch.float64, expected torch.float32"),
    (0, lambda x: x[:, :7], r"weight has shape \[3, 23, 16\], expected \[3, 7, 16\]"),
    (1, lambda w: w[:2], r"weight has shape \[2, 23, 16\], expected \[3, 23, 16\]"),
    (1, lambda w: w.half(), "weight has dtype torch.float16, expected one of"),
    (2, lambda b: b[:3], r"bias has shape \[3\], expected \[37\]"),
    (2, lambda b: b.double(), "bias has dtype torch.float64, expected torch.float32"),
]


@pytest.mark.parametrize(("which", "change", "message"), ERRORS, ids=[f"{w}-{i}" for i, (w, _, _) in enumerate(ERRORS)])
def test_errors(impl, which, change, message):
    x, weight, bias = make_case()
    given_ = [x, pack_linear(weight), bias]
    given_[which] = change(given_[which])
    with pytest.raises(ValueError, match=message):
        packed_linear(given_[0], given_[1], 37, bias=given_[2])


@pytest.mark.parametrize(("depth", "columns"), [(0, 5), (4, 0)])
def test_no_depth_or_columns_is_an_error(impl, depth, columns):
    with pytest.raises(ValueError, match=r"expected \[\.\., K\], K > 0, and columns > 0"):
        packed_linear(torch.zeros(3, depth), torch.zeros(1, depth, 16), columns)


def test_pack_errors():
    with pytest.raises(ValueError, match=r"packed as torch\.float16, expected one of"):
        pack_linear(torch.zeros(3, 4), torch.float16)
    with pytest.raises(ValueError, match=r"weight has shape \[3\], expected \[\*, \*\]"):
        pack_linear(torch.zeros(3))


@dtypes
def test_opcheck(dtype):
    x, weight, bias = make_case()
    torch.library.opcheck(torch.ops.stars.packed_linear.default, (x, pack_linear(weight, dtype), 37, bias))


# --- packed_swiglu ---


@dtypes
@pytest.mark.parametrize("rows", [0, 1, 3, 8, 9, 29])
@pytest.mark.parametrize(("columns", "depth"), [(1, 1), (16, 8), (37, 23), (130, 64), (200, 300)])
def test_swiglu_is_silu_times_linear(impl, dtype, columns, depth, rows):
    x, gate, _ = make_case(rows, columns, depth)
    up = make_case(rows, columns, depth, seed=1)[1]
    gate, up = 3 * gate / depth**0.5, up / depth**0.5
    found = packed_swiglu(x, pack_linear(gate, dtype), pack_linear(up, dtype), columns)
    assert found.shape == (rows, columns)
    gate, up = gate.to(dtype).double(), up.to(dtype).double()
    truth = F.silu(F.linear(x.double(), gate)) * F.linear(x.double(), up)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


def test_swiglu_at_the_ends_of_the_range(impl):
    x = torch.tensor([[1e4], [-1e4], [90.0], [-90.0], [0.0], [torch.nan], [torch.inf]])
    one = pack_linear(torch.ones(20, 1))
    found = packed_swiglu(x, one, one, 20)[:, 3]
    expected = (F.silu(x) * x)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-30, equal_nan=True)


def test_swiglu_bits_do_not_depend_on_the_batch():
    if not compiled("packed_swiglu"):
        pytest.skip("the definition promises no bits")
    x, gate, _ = make_case(rows=33, columns=200, depth=300)
    weights = pack_linear(gate), pack_linear(make_case(33, 200, 300, seed=1)[1])
    whole = packed_swiglu(x, *weights, 200)
    for rows in (1, 2, 8, 20):
        assert torch.equal(torch.cat([packed_swiglu(part, *weights, 200) for part in x.split(rows)]), whole)


def test_swiglu_errors(impl):
    x, weight, _ = make_case()
    packed = pack_linear(weight)
    with pytest.raises(ValueError, match=r"gate has shape \[2, 23, 16\], expected \[3, 23, 16\]"):
        packed_swiglu(x, packed[:2], packed, 37)
    with pytest.raises(ValueError, match=r"up has dtype torch.bfloat16, expected torch.float32"):
        packed_swiglu(x, packed, packed.bfloat16(), 37)


def test_swiglu_opcheck():
    x, weight, _ = make_case()
    packed = pack_linear(weight)
    torch.library.opcheck(torch.ops.stars.packed_swiglu.default, (x, packed, packed, 37))
