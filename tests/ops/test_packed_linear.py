import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import stars_kernels
from stars_kernels.ops import pack_linear, packed_linear
from tests.ops.helpers import dtype_name, generator, strided

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
    if stars_kernels.backends()["packed_linear"]["cpu"] != "cpp":
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


def test_pack_errors():
    with pytest.raises(ValueError, match=r"packed as torch\.float16, expected one of"):
        pack_linear(torch.zeros(3, 4), torch.float16)
    with pytest.raises(ValueError, match=r"weight has shape \[3\], expected \[\*, \*\]"):
        pack_linear(torch.zeros(3))


@dtypes
def test_opcheck(dtype):
    x, weight, bias = make_case()
    torch.library.opcheck(torch.ops.stars.packed_linear.default, (x, pack_linear(weight, dtype), 37, bias))
