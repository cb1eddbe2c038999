import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from stars_kernels.ops import reward_head
from tests.ops.helpers import DTYPES, assert_no_worse, dtype_name, generator, longs, strided

EPS = 1e-5
options = pytest.mark.parametrize(
    ("bias", "norm"),
    [(False, False), (True, False), (False, True), (True, True)],
    ids=["head", "bias", "norm", "bias and norm"],
)


def make_case(dtype=torch.float64, bias=True, norm=True, rows=40, steps=9, size=64):
    """Arguments of reward_head; every position but each row's last is NaN."""
    g = generator(rows * size)

    def noise(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    last = torch.arange(rows) * 5 % steps  # the first row's is 0
    last[-1:] = steps - 1
    hidden = torch.full((rows, steps, size), torch.nan, dtype=dtype)
    hidden[torch.arange(rows), last] = noise(rows, size) * 3
    return {
        "hidden": hidden,
        "last": last,
        "weight": noise(size),
        "bias": noise(1) if bias else None,
        "norm_weight": noise(size) + 1 if norm else None,
        "eps": EPS,
    }


def plain(case, dtype):
    """The same by transformers' norm and torch's linear in `dtype`, a row at a time."""
    rewards = []
    for row, last in zip(case["hidden"], case["last"], strict=True):
        x = row[last].to(dtype)
        if case["norm_weight"] is not None:
            if dtype == torch.float64:  # LlamaRMSNorm computes in fp32
                x = F.rms_norm(x, x.shape, case["norm_weight"].to(dtype), case["eps"])
            else:
                norm = LlamaRMSNorm(len(x), eps=case["eps"]).to(dtype)
                norm.weight.data.copy_(case["norm_weight"])
                x = norm(x).detach()
        bias = None if case["bias"] is None else case["bias"].to(dtype)
        rewards.append(F.linear(x, case["weight"].to(dtype)[None], bias)[0])
    return torch.stack(rewards)


def test_the_truth_is_llamas_norm():
    case = make_case(torch.float32)
    torch.testing.assert_close(plain(case, torch.float32).double(), plain(case, torch.float64), rtol=1e-5, atol=1e-4)


@options
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("size", [1, 7, 64, 1027])
def test_rewards(impl, dtype, bias, norm, size):
    case = make_case(dtype, bias, norm, size=size)
    reward = reward_head(**case)
    assert reward.shape == (40,)
    assert reward.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_no_worse(reward, plain(case, dtype), plain(case, torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_half_inputs_accumulate_in_fp32(impl, dtype):
    case = make_case(dtype, size=1027)
    torch.testing.assert_close(reward_head(**case).double(), plain(case, torch.float64), rtol=1e-4, atol=1e-3)


def test_nan_reaches_its_own_row_alone(impl):
    case = make_case()
    expected = reward_head(**case)
    case["hidden"][2, case["last"][2], 5] = torch.nan
    reward = reward_head(**case)
    assert reward[2].isnan()
    keep = [0, 1, 3, 4, 5]
    torch.testing.assert_close(reward[keep], expected[keep])


def test_one_position(impl):
    case = make_case(steps=1)
    torch.testing.assert_close(reward_head(**case), plain(case, torch.float64))


@options
def test_zero_rows(impl, bias, norm):
    case = make_case(torch.bfloat16, bias, norm, rows=0)
    reward = reward_head(**case)
    assert reward.shape == (0,) and reward.dtype == torch.float32


def test_strided_inputs(impl):
    case = make_case()
    views = {k: strided(v) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    torch.testing.assert_close(reward_head(**views), reward_head(**case))


ERRORS = [
    pytest.param({"hidden": torch.zeros(6, 64)}, r"hidden has shape \[6, 64\], expected \[\*, \*, \*\]", id="hidden"),
    pytest.param({"last": longs(0)}, r"last has shape \[1\], expected \[40\]", id="last shape"),
    pytest.param({"last": torch.zeros(40)}, "dtype torch.float32, expected torch.int64", id="last dtype"),
    pytest.param({"weight": torch.zeros(1, 64)}, r"weight has shape \[1, 64\], expected \[64\]", id="weight"),
    pytest.param({"bias": torch.zeros(2)}, r"bias has shape \[2\], expected \[1\]", id="bias"),
    pytest.param({"norm_weight": torch.zeros(3)}, r"norm_weight has shape \[3\], expected \[64\]", id="norm"),
]


@pytest.mark.parametrize(("wrong", "message"), ERRORS)
def test_errors(impl, wrong, message):
    case = make_case()
    reward_head(**case)
    with pytest.raises(ValueError, match=message):
        reward_head(**(case | wrong))


@options
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=dtype_name)
def test_opcheck(dtype, bias, norm):
    torch.library.opcheck(torch.ops.stars.reward_head.default, tuple(make_case(dtype, bias, norm).values()))
