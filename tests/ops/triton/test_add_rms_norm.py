import pytest
import torch

from stars_kernels.ops.triton.add_rms_norm import add_rms_norm_triton
from stars_kernels.ops.triton.rms_norm import BLOCK_D, rms_norm_triton
from tests.ops.helpers import dtype_name, strided
from tests.ops.test_add_rms_norm import make_case
from tests.ops.test_rms_norm import EPS

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)


@dtypes
@pytest.mark.parametrize("shape", [(1,), (5, 3, 64), (3, 1027), (2, BLOCK_D + 1)], ids=str)
def test_is_the_sum_and_its_norm(device, dtype, shape):
    x, residual, weight = make_case(dtype, shape)
    total, normed = add_rms_norm_triton(*(t.to(device) for t in (x, residual, weight)), EPS)
    assert torch.equal(total.cpu(), residual + x)
    assert torch.equal(normed, rms_norm_triton(total, weight.to(device), EPS)), "as the two, one after the other"


def test_odd_inputs(device):
    x, residual, weight = (t.to(device) for t in make_case(torch.bfloat16))
    expected = add_rms_norm_triton(x, residual, weight, EPS)
    found = add_rms_norm_triton(strided(x), strided(residual), strided(weight), EPS)
    assert all(map(torch.equal, found, expected))
    assert [part.shape for part in add_rms_norm_triton(x[:0], residual[:0], weight, EPS)] == [(0, 3, 64)] * 2
