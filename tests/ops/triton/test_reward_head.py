import pytest
import torch

from stars_kernels.ops.triton.reward_head import reward_head_triton
from tests.ops.helpers import assert_no_worse, dtype_name, moved, strided
from tests.ops.test_reward_head import make_case, options, plain

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)


def rewards(case, device):
    reward = reward_head_triton(**moved(case, device))
    assert reward.dtype == torch.float32
    return reward.cpu()


@options
@dtypes
@pytest.mark.parametrize("size", [1, 7, 64, 1027, 4096])
def test_rewards(device, dtype, bias, norm, size):
    case = make_case(dtype, bias, norm, rows=11, size=size)
    truth = plain(case, torch.float64)
    assert_no_worse(rewards(case, device), plain(case, dtype), truth)
    torch.testing.assert_close(rewards(case, device).double(), truth, rtol=1e-4, atol=1e-3)  # sums in fp32


def test_nan_reaches_its_own_row_alone(device):
    case = make_case(torch.float32, rows=5)
    expected = rewards(case, device)
    case["hidden"][2, case["last"][2], 5] = torch.nan
    reward = rewards(case, device)
    assert reward[2].isnan()
    assert torch.equal(reward[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@dtypes
def test_strided_inputs(device, dtype):
    case = make_case(dtype, rows=6)
    views = {name: strided(value) if isinstance(value, torch.Tensor) else value for name, value in case.items()}
    assert torch.equal(rewards(views, device), rewards(case, device))


def test_a_rows_bits_do_not_depend_on_its_batch(device):
    case = make_case(torch.float32, rows=9, size=3000)
    whole = rewards(case, device)
    alone = case | {"hidden": case["hidden"][4:5], "last": case["last"][4:5]}
    assert torch.equal(rewards(alone, device), whole[4:5])
    none = case | {"hidden": case["hidden"][:0], "last": case["last"][:0]}
    assert rewards(none, device).shape == (0,)
