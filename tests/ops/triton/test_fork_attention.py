import pytest
import torch

from stars_kernels.ops.fork_attention import fork_attention_ref
from stars_kernels.ops.triton import fork_attention as module
from stars_kernels.ops.triton.fork_attention import fork_attention_triton
from tests.ops.helpers import assert_no_worse, dtype_name, moved, strided
from tests.ops.test_fork_attention import (
    LAYOUTS,
    SCALES,
    SHAPES,
    eager,
    in_order,
    make_case,
    shapes,
    steps_1_5,
    variants,
)
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


@variants
@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_of_any_sign(device, scale, variant):
    case = make_case(
        steps=2, dtype=torch.float32, prompt=(2, 2, 0), suffix_len=[3, 6, 2], query_len=[2, 1, 2], **variant
    )
    assert_right(case | {"scale": scale}, device)


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


@variants
@steps_1_5
def test_rows_of_a_prompt_share_a_block(device, splits, steps, variant):
    """As the engine lays them out; each row's window and suffix are its own, and no two are equally long."""
    case = make_case(steps=steps, prompt=(2, 2, 2, 0, 0, 1, 1, 1), dtype=torch.float32, seed=8, **variant)
    assert_right(case, device)


BLOCKS = [
    pytest.param({"prompt": (0,) * 5}, id="one block"),
    pytest.param({"prompt": (0, 0, 2, 2, 0), "steps": 5}, id="runs of scored segments"),
    pytest.param({"prompt": (2,) * 5, "softcap": 1.5, "sinks": True}, id="softcap and sinks"),
    pytest.param({"prompt": (1, 1, 1), "suffix_len": [1, 1, 1], "query_len": [1, 1, 1]}, id="one token, no prefix"),
]


@pytest.mark.parametrize("layout", BLOCKS)
@pytest.mark.parametrize("name", ["suffix_key", "suffix_value"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_a_broken_row_breaks_no_sibling(device, splits, value, name, layout):
    """0 * inf is NaN: it must not reach the other rows of a tile, and its own row gets what the definition gives."""
    case = OPTIONS | make_case(dtype=torch.float32, shape=(6, 2, 16, 16), seed=9, **layout)
    intact = attended(case, device)
    assert intact.isfinite().all()
    broken = 1
    case[name][broken, 0, 1, 3] = value  # a slot that all queries of the row see, one of its two heads
    out, expected = attended(case, device), fork_attention_ref(**case)
    assert case["softcap"] or not expected[broken].isfinite().all()
    torch.testing.assert_close(out[broken], expected[broken], rtol=1e-4, atol=1e-5, equal_nan=True)
    others = torch.arange(len(out)) != broken
    torch.testing.assert_close(out[others], intact[others], rtol=1e-4, atol=1e-5)


@dtypes
def test_a_prefix_value_stays_with_those_whose_window_holds_it(device, dtype):
    """Key 62 is inside the second row's window alone; both rows share its tile."""
    case = make_case(shape=(1, 1, 4, 4), lengths=(70,), prompt=(0, 0), suffix_len=[6, 1], query_len=[1, 1], dtype=dtype)
    case["arena_value"][case["offsets"][0] + 62] = torch.inf
    out = attended(case | {"window": 10}, device)
    assert out[0].isfinite().all() and (out[1] == torch.inf).all()


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
