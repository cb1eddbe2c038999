import pytest
import torch

from stars_kernels.ops.triton.rotary_store import rotary_store_triton
from tests.ops.helpers import bits_of, dtype_name, moved, strided
from tests.ops.test_rotary_store import SHAPES, expected_of, make_case, run

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)


def stored(case, device):
    return [part.cpu() for part in run(moved(case, device), rotary_store_triton)]


@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_models_own_to_the_bit(device, dtype, shape):
    case = make_case(dtype, shape)
    for found, expected in zip(stored(case, device), expected_of(case), strict=True):
        assert torch.equal(bits_of(found), bits_of(expected))


def test_strides(device):
    case = make_case(torch.bfloat16, "a wide group")
    expected = stored(case, device)
    names = ("query", "key", "value")
    joined = torch.cat([case[name].flatten(2) for name in names], dim=-1)
    parts = joined.split([case[name].flatten(2).shape[-1] for name in names], dim=-1)
    one_product = {name: part.unflatten(-1, case[name].shape[2:]) for name, part in zip(names, parts, strict=True)}
    every_second = {name: strided(case[name]) for name in (*names, "cos", "sin")}
    for changes in (one_product, every_second):
        assert all(map(torch.equal, stored(case | changes, device), expected))
    none = {name: case[name][:0] for name in (*names, "cos", "sin", "keys", "values")}
    assert rotary_store_triton(*moved(case | none, device).values()).shape == (0, 3, 9, 64)
