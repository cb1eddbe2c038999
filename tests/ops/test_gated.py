import pytest
import torch
import torch.nn.functional as F

from stars_kernels.ops import gated
from tests.ops.helpers import DTYPES, dtype_name, generator, strided

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
MODELS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def make_case(dtype=torch.float32, shape=(5, 3, 70), seed=0):
    g = generator(seed)
    gate, up = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) * 4 for _ in range(2))
    return gate, up


@dtypes
@pytest.mark.parametrize("activation", MODELS)
def test_equals_the_models_own(impl, dtype, activation):
    gate, up = make_case(dtype)
    found = gated(gate, up, activation=activation)
    assert found.is_contiguous() and torch.equal(found, MODELS[activation](gate) * up)
    assert torch.equal(gated(strided(gate), strided(up), activation=activation), found)
    both = torch.cat([gate, up], dim=-1)
    assert torch.equal(gated(*both.chunk(2, dim=-1), activation=activation), found)
    assert gated(gate[:0], up[:0], activation=activation).shape == (0, 3, 70)


def test_errors(impl):
    gate, up = make_case()
    with pytest.raises(ValueError, match=r"up has shape \[4, 3, 70\], expected \[5, 3, 70\]"):
        gated(gate, up[:4], activation="silu")
    with pytest.raises(ValueError, match=r"up has dtype torch.float64, expected torch.float32"):
        gated(gate, up.double(), activation="silu")
    with pytest.raises(ValueError, match=r"activation is 'relu', expected one of silu, gelu_tanh"):
        gated(gate, up, activation="relu")
    with pytest.raises(ValueError, match=r"gate has shape \[3\] and dtype torch.int64, expected"):
        gated(torch.arange(3), torch.arange(3), activation="silu")


def test_opcheck():
    torch.library.opcheck(torch.ops.stars.gated.default, (*make_case(), "silu"))
