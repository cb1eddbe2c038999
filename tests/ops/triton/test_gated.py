import pytest
import torch

from stars_kernels.ops.gated import ACTIVATIONS, gated_ref
from stars_kernels.ops.triton.gated import BLOCK, gated_triton
from tests.ops.helpers import assert_no_worse, dtype_name
from tests.ops.test_gated import make_case

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)


@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1,), (5, 3, 70), (2, BLOCK + 1)], ids=str)
def test_values(device, dtype, activation, shape):
    gate, up = make_case(dtype, shape)
    both = torch.cat([gate, up], dim=-1).to(device)
    found = gated_triton(*both.chunk(2, dim=-1), activation).cpu()
    assert found.shape == gate.shape and found.dtype == dtype
    assert_no_worse(found, gated_ref(gate, up, activation), gated_ref(gate.double(), up.double(), activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_ends(device, activation):
    """Nothing overflows on the way: far below zero it is -0, far above the product itself, and NaN stays."""
    gate = torch.tensor([-1e30, -200.0, 0.0, 200.0, 1e30, torch.nan])
    found = gated_triton(gate.to(device), torch.full_like(gate, 2.0).to(device), activation).cpu()
    assert torch.equal(found[:5], torch.tensor([0.0, 0.0, 0.0, 400.0, 2e30])) and found[5].isnan()


def test_the_activation_is_rounded_before_the_product(device):
    gate, up = make_case(torch.bfloat16, (4, 512))
    once = gated_ref(gate.float(), up.float(), "silu").to(torch.bfloat16)
    found, twice = gated_triton(gate.to(device), up.to(device), "silu").cpu(), gated_ref(gate, up, "silu")
    assert (found != once).float().mean() > 0.1 > 0.01 > (found != twice).float().mean()
    assert gated_triton(gate[:0].to(device), up[:0].to(device), "silu").shape == (0, 512)
