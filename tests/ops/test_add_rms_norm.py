import pytest
import torch

from stars_kernels.ops import add_rms_norm, rms_norm
from tests.ops import test_rms_norm
from tests.ops.helpers import DTYPES, assert_no_worse, dtype_name, generator, strided
from tests.ops.test_rms_norm import EPS

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def make_case(dtype=torch.float32, shape=(5, 3, 64), seed=0):
    x, weight = test_rms_norm.make_case(dtype, shape, seed)
    return x, torch.randn(shape, generator=generator(seed + 1), dtype=torch.float64).to(dtype), weight


@dtypes
@pytest.mark.parametrize("shape", [(1,), (5, 3, 64), (3, 1027)], ids=str)
def test_is_the_sum_and_its_norm(impl, dtype, shape):
    x, residual, weight = make_case(dtype, shape)
    total, normed = add_rms_norm(x, residual, weight, eps=EPS)
    assert torch.equal(total, residual + x) and normed.dtype == dtype
    assert torch.equal(normed, rms_norm(total, weight, eps=EPS)), "as the two ops, one after the other"
    assert_no_worse(normed, rms_norm(total, weight, eps=EPS), rms_norm(total.double(), weight.double(), eps=EPS))


def test_odd_inputs(impl):
    x, residual, weight = make_case()
    expected = add_rms_norm(x, residual, weight, eps=EPS)
    found = add_rms_norm(strided(x), strided(residual), strided(weight), eps=EPS)
    assert all(map(torch.equal, found, expected))
    assert [part.shape for part in add_rms_norm(x[:0], residual[:0], weight, eps=EPS)] == [(0, 3, 64)] * 2


def test_errors(impl):
    x, residual, weight = make_case()
    with pytest.raises(ValueError, match=r"residual has shape \[4, 3, 64\], expected \[5, 3, 64\]"):
        add_rms_norm(x, residual[:4], weight, eps=EPS)
    with pytest.raises(ValueError, match=r"residual has dtype torch.float64, expected torch.float32"):
        add_rms_norm(x, residual.double(), weight, eps=EPS)
    with pytest.raises(ValueError, match=r"weight has shape \[63\], expected \[64\]"):
        add_rms_norm(x, residual, weight[:63], eps=EPS)
    with pytest.raises(ValueError, match=r"x has shape \[5, 3, 64\] and dtype torch.int64, expected"):
        add_rms_norm(x.long(), residual, weight, eps=EPS)


def test_opcheck():
    torch.library.opcheck(torch.ops.stars.add_rms_norm.default, (*make_case(), EPS))
