import pytest
import torch

from stars_kernels.ops.triton import fork_attention as module
from stars_kernels.ops.triton.fork_attention import fork_attention_triton
from tests.ops.helpers import assert_no_worse, dtype_name, moved, strided
from tests.ops.test_fork_attention import LAYOUTS, SHAPES, eager, in_order, make_case, shapes, steps_1_5, variants
from tests.ops.triton.conftest import INTERPRETED

DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter gets bfloat16 products wrong"),
    ),
]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
OPTIONS = {"window": 0, "softcap": 0.0, "sinks": None}


@pytest.fixture(params=[1, 3], ids=["whole", "3 splits"])
def splits(request, monkeypatch):
    """Prefixes in one piece, or cut in three however short they are."""
    monkeypatch.setattr(module, "MAX_SPLITS", request.param)
    monkeypatch.setattr(module, "TARGET_PROGRAMS", 1 << 20)
    monkeypatch.setattr(module, "SPLIT_KEYS", 1)
    return request.param


def attended(case, device):
    return fork_attention_triton(**moved(OPTIONS | case, device)).cpu()


def assert_right(case, device):
    out = attended(case, device)
    assert out.dtype == case["query"].dtype
    # torch's own fp32 product on a CPU adds in lanes, which over 256 terms is more exact than any GPU's.
    product = in_order if out.dtype == torch.float32 else torch.matmul
    assert_no_worse(out, eager(case, out.dtype, product), eager(case, torch.float64))
    padded = torch.arange(out.shape[1]) >= case["query_len"][:, None]
    assert (out[padded] == 0).all()


@variants
@steps_1_5
@dtypes
def test_variants(device, splits, dtype, steps, variant, launches):
    assert_right(make_case(steps=steps, dtype=dtype, **variant), device)
    assert launches == (["_fork_attention"] if splits == 1 else ["_fork_attention", "_merge"])


@shapes
@dtypes
def test_head_shapes(device, splits, dtype, shape):
    assert_right(make_case(steps=2, shape=shape, dtype=dtype, seed=1), device)


@pytest.mark.parametrize("size", [64, 96, 128, 256])
@dtypes
def test_head_sizes(device, dtype, size):
    case = make_case(dtype=dtype, shape=(4, 2, size, size), lengths=(70, 3), prompt=(0, 0, 1, 1, 0), seed=2)
    assert_right(case, device)


@dtypes
def test_long_prefix(device, splits, dtype):
    case = make_case(dtype=dtype, shape=(6, 2, 32, 32), lengths=(300, 65), prompt=(0, 1, 0, 0, 1), seed=2)
    assert_right(case, device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, splits, layout):
    assert_right(make_case(steps=2, dtype=torch.float32, **({"seed": 3} | layout)), device)


@dtypes
def test_more_rows_and_steps_than_a_block_holds(device, dtype):
    """Many rows of one prompt, and rows whose own queries fill several blocks."""
    assert_right(make_case(dtype=dtype, lengths=(40, 9), prompt=(0,) * 25 + (1,) * 5, seed=5), device)
    many = make_case(
        steps=70, dtype=dtype, shape=(6, 2, 16, 16), prompt=(0, 2), suffix_len=[70, 66], query_len=[70, 33], seed=6
    )
    assert_right(many, device)


def test_strided_inputs(device):
    case = make_case(steps=3, dtype=torch.float32)
    views = {name: strided(value) if isinstance(value, torch.Tensor) else value for name, value in case.items()}
    assert torch.equal(attended(views, device), attended(case, device))


def test_a_row_in_another_batch(device):
    case = make_case(steps=3, shape=SHAPES[0], dtype=torch.float32, seed=4)
    whole = attended(case, device)
    of_rows = ("query", "suffix_key", "suffix_value", "suffix_len", "query_len", "prompt")
    for rows in ([3], [0, 7], [7, 6, 5, 4, 3, 2, 1, 0]):
        part = attended(case | {name: case[name][rows] for name in of_rows}, device)
        torch.testing.assert_close(part, whole[rows], rtol=1e-5, atol=1e-6)


def test_zero_rows(device):
    case = make_case(steps=2, prompt=(), suffix_len=[], query_len=[], dtype=torch.float32)
    assert attended(case, device).shape == (0, 2, 9, 16)
    attended(make_case(dtype=torch.float32), device)  # the fixture wants a launch
