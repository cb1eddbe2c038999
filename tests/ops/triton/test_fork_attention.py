import itertools

import pytest
import torch
import torch.nn.functional as F

from stars_kernels.ops.fork_attention import fork_attention_ref
from stars_kernels.ops.triton import fork_attention as module
from stars_kernels.ops.triton.fork_attention import fork_attention_triton
from tests.ops.helpers import assert_no_worse, dtype_name, longs, moved, strided
from tests.ops.test_fork_attention import (
    LAYOUTS,
    SCALES,
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


@pytest.fixture(params=[1, 4], ids=["whole", "3 splits"])
def splits(request, monkeypatch):
    """Prefixes in one piece, or in up to three, which are dealt to programs however short they are."""
    monkeypatch.setattr(module, "MAX_SPLITS", request.param)
    monkeypatch.setattr(module, "SPLIT_KEYS", 8)
    monkeypatch.setattr(module, "TARGET_PROGRAMS", 1 << 20)
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


OF_ROWS = ("query", "suffix_key", "suffix_value", "suffix_len", "query_len", "prompt")
BITS = [
    pytest.param(torch.bfloat16, {"steps": 3, "window": 140, "softcap": 1.5, "sinks": True}, id="bf16, S=3, together"),
    pytest.param(
        torch.bfloat16, {"suffix_len": [20, 3, 33, 1, 17], "query_len": [1] * 5, "slots": 33}, id="bf16, long"
    ),
    pytest.param(torch.float32, {}, id="fp32"),
]


@pytest.mark.parametrize(("dtype", "variant"), BITS)
def test_a_rows_bits_depend_on_its_own_prompt_alone(device, dtype, variant, launches, products_in_order, monkeypatch):
    """Not on the rows and prompts beside it, the arena's size, nor on how the launch is cut."""
    monkeypatch.setattr(module, "SPLIT_KEYS", 64)
    layout = {"shape": (2, 1, 16, 16), "lengths": (150, 0, 70), "prompt": (2, 0, 0, 1, 0), "seed": 4}
    case = make_case(**layout, dtype=dtype, **variant)
    whole = attended(case, device)
    for rows in ([4], [4, 1, 3, 0, 2]):
        assert torch.equal(attended(case | {name: case[name][rows] for name in OF_ROWS}, device), whole[rows])
    begin = int(case["offsets"][0])
    alone = {name: case[name][begin : begin + 150] for name in ("arena_key", "arena_value")}
    alone |= {name: case[name][[1, 4]] for name in OF_ROWS} | {"prompt": longs(0, 0)}
    alone |= {"offsets": longs(0), "lengths": longs(150)}
    assert torch.equal(attended(case | alone, device), whole[[1, 4]])
    larger = {name: F.pad(case[name], (0, 0, 0, 0, 0, 3000), value=torch.nan) for name in ("arena_key", "arena_value")}
    assert torch.equal(attended(case | larger, device), whole)
    assert set(launches) == {"_fork_attention", "_merge"}
    for name, value, seen in (
        ("WORKSPACE", 0, ["_fork_attention"]),  # one program reads all parts
        ("TARGET_PROGRAMS", 1, ["_fork_attention"]),
        ("WHOLE_SPLITS", 2, ["_fork_attention", "_merge"]),  # or those of the shorter prompts
        ("LEAST_READERS", 1, ["_fork_attention", "_merge"]),  # or stores them
    ):
        monkeypatch.setattr(module, name, value)
        if name == "TARGET_PROGRAMS":
            monkeypatch.setattr(module, "WORKSPACE", 1 << 30)
        launches.clear()
        assert torch.equal(attended(case, device), whole)
        assert launches == seen


def test_the_room_for_parts_is_bounded(device):
    """By the sizes of a call, whatever the prompts' lengths: it is a plan of the host."""
    for rows, prompts, slots, steps in itertools.product((1, 20, 512, 2048), (1, 64), (100, 10**6), (1, 15, 1024)):
        cut = module.plan(rows, prompts, slots, steps * 4, 8, 128, 64)
        assert cut.stored * rows * steps * 32 * 130 * 4 <= module.WORKSPACE
        assert cut.stored in (0, min(module.MAX_SPLITS, -(-slots // module.SPLIT_KEYS)) + 1)
        assert cut.row_blocks == 1 or cut.together == 1
        assert cut.together * steps * 4 <= 64 * cut.row_blocks
        assert 1 <= cut.readers <= max(1, cut.stored)
    attended(make_case(prompt=(1,), suffix_len=[1], query_len=[1], dtype=torch.float32), device)  # a fixture wants one


def test_zero_rows(device):
    case = make_case(steps=2, prompt=(), suffix_len=[], query_len=[], dtype=torch.float32)
    assert attended(case, device).shape == (0, 2, 9, 16)
    attended(make_case(dtype=torch.float32), device)  # the fixture wants a launch
