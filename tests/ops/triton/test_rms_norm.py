import pytest
import torch

from stars_kernels.ops.rms_norm import rms_norm_ref
from stars_kernels.ops.triton.rms_norm import BLOCK_D, rms_norm_triton
from tests.ops.helpers import assert_no_worse, dtype_name, generator, strided
from tests.ops.test_rms_norm import EPS, make_case

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)


def normed(x, weight, device):
    return rms_norm_triton(x.to(device), weight.to(device), EPS).cpu()


@dtypes
@pytest.mark.parametrize("shape", [(1,), (5, 3, 64), (7, 1), (3, 1027), (2, BLOCK_D + 1)], ids=str)
def test_norms(device, dtype, shape):
    x, weight = make_case(dtype, shape)
    found, plain = normed(x, weight, device), rms_norm_ref(x, weight, EPS)
    assert found.shape == x.shape and found.dtype == dtype
    assert_no_worse(found, plain, rms_norm_ref(x.double(), weight.double(), EPS))


def test_a_row_is_rounded_before_it_meets_the_weight(device):
    """Where the weights are large, the two roundings of LlamaRMSNorm and one rounding differ in most places."""
    x, _ = make_case(torch.bfloat16, (4, 512))
    weight = (1 + torch.rand(512, generator=generator(1))).to(torch.bfloat16)
    once = rms_norm_ref(x.float(), weight.float(), EPS).to(torch.bfloat16)
    found, twice = normed(x, weight, device), rms_norm_ref(x, weight, EPS)
    assert (found != once).float().mean() > 0.1 > 0.01 > (found != twice).float().mean()


@dtypes
def test_odd_inputs(device, dtype):
    x, weight = make_case(dtype, (5, 3, 100))
    expected = normed(x, weight, device)
    assert torch.equal(normed(strided(x), strided(weight), device), expected)
    x[2, 1, 7] = torch.nan
    broken = normed(x, weight, device)
    assert broken[2, 1].isnan().all() and broken.isnan().sum() == 100
    assert (normed(torch.zeros(2, 100, dtype=dtype), weight, device) == 0).all()


def test_a_rows_bits_do_not_depend_on_its_batch(device):
    x, weight = make_case(torch.bfloat16, (9, 300))
    whole = normed(x, weight, device)
    assert torch.equal(normed(x[4:5], weight, device), whole[4:5])
    assert rms_norm_triton(x[:0].to(device), weight.to(device), EPS).shape == (0, 300)
