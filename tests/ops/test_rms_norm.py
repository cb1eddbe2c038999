import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from stars_kernels.ops import reference, rms_norm
from tests.ops.helpers import DTYPES, assert_no_worse, compiled, dtype_name, generator, strided

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
EPS = 1e-5


def make_case(dtype=torch.float32, shape=(5, 3, 64), seed=0):
    g = generator(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64) * 3
    return x.to(dtype), (torch.randn(shape[-1], generator=g, dtype=torch.float64) + 1).to(dtype)


@dtypes
@pytest.mark.parametrize("shape", [(1,), (64,), (5, 3, 64), (7, 1), (40, 576), (3, 1027)], ids=str)
def test_equals_the_models_norm(impl, dtype, shape):
    x, weight = make_case(dtype, shape)
    found = rms_norm(x, weight, eps=EPS)
    assert found.shape == x.shape and found.dtype == dtype
    norm = LlamaRMSNorm(shape[-1], eps=EPS).to(dtype)
    norm.weight.data.copy_(weight)
    truth = F.rms_norm(x.double(), shape[-1:], weight.double(), EPS)
    plain = F.rms_norm(x, shape[-1:], weight, EPS) if dtype == torch.float64 else norm(x).detach()
    assert_no_worse(found, plain, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
def test_the_definition_is_the_models_norm_to_the_bit(dtype):
    with reference():
        for seed, size in enumerate((1, 64, 576, 1027, 4096)):
            x, weight = make_case(dtype, (40, size), seed)
            norm = LlamaRMSNorm(size, eps=EPS).to(dtype)
            norm.weight.data.copy_(weight)
            assert torch.equal(rms_norm(x, weight, eps=EPS), norm(x).detach())


def test_odd_inputs(impl):
    x, weight = make_case()
    expected = rms_norm(x, weight, eps=EPS)
    assert torch.equal(rms_norm(strided(x), strided(weight), eps=EPS), expected)
    assert rms_norm(x[:0], weight, eps=EPS).shape == (0, 3, 64)
    x[2, 1, 7] = torch.nan
    broken = rms_norm(x, weight, eps=EPS)
    assert broken[2, 1].isnan().all() and broken.isnan().sum() == 64
    assert (rms_norm(torch.zeros(2, 64), weight, eps=EPS) == 0).all()


def test_a_rows_bits_do_not_depend_on_its_batch():
    if not compiled("rms_norm"):
        pytest.skip("the definition promises no bits")
    x, weight = make_case(shape=(33, 577))
    whole = rms_norm(x, weight, eps=EPS)
    assert torch.equal(torch.cat([rms_norm(row[None], weight, eps=EPS) for row in x]), whole)


def test_errors(impl):
    x, weight = make_case()
    with pytest.raises(ValueError, match=r"weight has shape \[63\], expected \[64\]"):
        rms_norm(x, weight[:63], eps=EPS)
    with pytest.raises(ValueError, match=r"x has shape \[5, 3, 64\] and dtype torch.int64, expected"):
        rms_norm(x.long(), weight, eps=EPS)


def test_opcheck():
    torch.library.opcheck(torch.ops.stars.rms_norm.default, (*make_case(), EPS))
