import pytest
import torch

from stars_kernels.ops import kv_commit
from tests.ops.helpers import DTYPES, bits_of, dtype_name, generator, longs, strided

LAYERS, HEADS, SIZE, ROWS, SLOTS, ARENA = 3, 2, 5, 7, 6, 40
NAMES = ("suffix", "arena", "lengths", "offsets", "prompt", "row", "count", "advance")


def random_bytes(dtype, *shape, seed):
    """Every bit pattern, NaN with payloads among them."""
    width = torch.empty((), dtype=dtype).element_size()
    return torch.randint(256, (*shape, width), generator=generator(seed), dtype=torch.uint8).view(dtype)[..., 0]


def make_case(dtype=torch.float32, prompt=(2, 0, 3), row=(4, 0, 6), count=(6, 1, 3), advance=(True, True, True)):
    return {
        "suffix": random_bytes(dtype, LAYERS, 2, ROWS, SLOTS, HEADS, SIZE, seed=0),
        "arena": random_bytes(dtype, LAYERS, 2, ARENA, HEADS, SIZE, seed=1),
        "lengths": longs(3, 5, 0, 2),
        "offsets": longs(20, 30, 2, 10),
        "prompt": longs(*prompt),
        "row": longs(*row),
        "count": longs(*count),
        "advance": torch.tensor(advance, dtype=torch.bool),
    }


def expected_after(case):
    """A plain loop over slots: the arena and the lengths after the call."""
    arena, lengths = case["arena"].clone(), case["lengths"].clone()
    calls = zip(*(case[name].tolist() for name in ("prompt", "row", "count", "advance")), strict=True)
    for p, row, count, advance in calls:
        for j in range(count):
            if row >= 0:
                arena[:, :, case["offsets"][p] + lengths[p] + j] = case["suffix"][:, :, row, j]
        lengths[p] += count if advance else 0
    return arena, lengths


def assert_commits(case):
    arena, lengths = expected_after(case)
    untouched = {name: case[name].clone() for name in set(NAMES) - {"arena", "lengths"}}
    assert kv_commit(**case) is None
    assert torch.equal(bits_of(case["arena"]), bits_of(arena))
    assert torch.equal(case["lengths"], lengths)
    for name, tensor in untouched.items():
        assert torch.equal(bits_of(case[name]), bits_of(tensor)), f"{name} was written"


CALLS = [
    pytest.param({}, id="three prompts"),
    pytest.param({"prompt": (1,), "row": (2,), "count": (5,), "advance": (1,)}, id="to the arena's end"),
    pytest.param({"advance": (0, 0, 0)}, id="into the tail"),
    pytest.param({"row": (-1, -1, -1)}, id="only lengths"),
    pytest.param({"row": (-1, 3, -1), "advance": (1, 0, 0)}, id="mixed"),
    pytest.param({"row": (1, 1, 1)}, id="one row to all"),
    pytest.param({"count": (0, 0, 0)}, id="no tokens"),
    pytest.param({"prompt": (), "row": (), "count": (), "advance": ()}, id="no prompts"),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_commit(impl, dtype, call):
    case = make_case(dtype, **call)
    if call.get("prompt") == (1,):
        assert case["offsets"][1] + case["lengths"][1] + 5 == ARENA
    assert_commits(case)


def test_the_expected_arena_differs():
    """What the other tests compare with is not the arena they start from."""
    case = make_case()
    arena, lengths = expected_after(case)
    changed = (bits_of(arena) != bits_of(case["arena"])).view(LAYERS, 2, ARENA, -1).any(-1)
    assert changed.sum() == LAYERS * 2 * 10 and lengths.tolist() == [4, 5, 6, 5]


def test_best_so_far_then_fallback(impl):
    """A better attempt overwrites the tail, the fallback then moves the length alone."""
    case = make_case(prompt=(2,), row=(4,), count=(6,), advance=(0,))
    kv_commit(**case)
    better = case | {"row": longs(1), "count": longs(4)}
    kv_commit(**better)
    assert case["lengths"][2] == 0
    kv_commit(**(better | {"row": longs(-1), "advance": torch.tensor([True])}))
    assert case["lengths"].tolist() == [3, 5, 4, 2]
    assert torch.equal(bits_of(case["arena"][:, :, 2:6]), bits_of(case["suffix"][:, :, 1, :4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_strided_inputs(impl, dtype):
    case = make_case(dtype, row=(4, -1, 6))
    arena, lengths = expected_after(case)
    views = {name: strided(tensor) for name, tensor in case.items()}
    views["suffix"] = case["suffix"].permute(5, 4, 3, 2, 1, 0).contiguous().permute(5, 4, 3, 2, 1, 0)
    views["arena"] = case["arena"].permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    assert not views["arena"].is_contiguous() and not views["suffix"].is_contiguous()
    kv_commit(**views)
    assert torch.equal(bits_of(views["arena"]), bits_of(arena))
    assert torch.equal(views["lengths"], lengths)


def test_part_of_a_wider_suffix(impl):
    """The engine's suffix buffer may hold more rows and slots than a round uses."""
    case = make_case()
    wide = random_bytes(torch.float32, LAYERS, 2, ROWS + 3, SLOTS + 4, HEADS, SIZE, seed=2)
    case["suffix"] = wide[:, :, 2 : ROWS + 2, :SLOTS]
    assert_commits(case)


ERRORS = [
    ("suffix", lambda t: t[0], r"suffix has shape \[2, 7, 6, 2, 5\], expected \[\*, 2, \*, \*, \*, \*\]"),
    ("suffix", lambda t: t.double(), "arena has dtype torch.float32, expected torch.float64"),
    ("arena", lambda t: t[:2], r"arena has shape \[2, 2, 40, 2, 5\], expected \[3, 2, \*, 2, 5\]"),
    ("arena", lambda t: t[..., :4], r"arena has shape \[3, 2, 40, 2, 4\], expected \[3, 2, \*, 2, 5\]"),
    ("offsets", lambda t: t[:2], r"offsets has shape \[2\], expected \[4\]"),
    ("lengths", lambda t: t.int(), "lengths has dtype torch.int32, expected torch.int64"),
    ("prompt", lambda t: t.int(), "prompt has dtype torch.int32, expected torch.int64"),
    ("row", lambda t: t[:1], r"row has shape \[1\], expected \[3\]"),
    ("count", lambda t: t.double(), "count has dtype torch.float64, expected torch.int64"),
    ("advance", lambda t: t.long(), "advance has dtype torch.int64, expected torch.bool"),
]


@pytest.mark.parametrize(("name", "change", "message"), ERRORS, ids=[f"{e[0]}-{i}" for i, e in enumerate(ERRORS)])
def test_errors(impl, name, change, message):
    case = make_case()
    before = case["arena"].clone()
    with pytest.raises(ValueError, match=message):
        kv_commit(**(case | {name: change(case[name])}))
    assert torch.equal(bits_of(case["arena"]), bits_of(before))
    assert_commits(case)


COMMIT = {
    "suffix": torch.ones(1, 2, 2, 3, 1, 4), "arena": torch.zeros(1, 2, 6, 1, 4),
    "lengths": longs(0, 2), "offsets": longs(0, 1),
    "prompt": longs(1), "row": longs(1), "count": longs(3), "advance": torch.tensor([True]),
}  # fmt: skip
OUTSIDE = [
    ({"prompt": longs(2)}, "prompt: expected 0 to 1, found 2"),
    ({"prompt": longs(-1)}, "prompt: expected 0 to 1, found -1"),
    ({"row": longs(2)}, "row: expected -1 to 1, found 2"),
    ({"row": longs(-2)}, "row: expected -1 to 1, found -2"),
    ({"count": longs(4)}, "count: expected 0 to 3, found 4"),
    ({"count": longs(-1)}, "count: expected 0 to 3, found -1"),
    ({"lengths": longs(0, -1), "row": longs(-1)}, "lengths: expected 0 to 6, found -1"),
]
# In the neighbour's slots, or in none.
MISPLACED = [
    ({"offsets": longs(0, 2)}, "prompt 1: 3 tokens from slot 4 on do not fit an arena of 6"),
    ({"lengths": longs(0, -1)}, "lengths: expected 0 to 6, found -1"),
    ({"lengths": longs(0, 7)}, "lengths: expected 0 to 6, found 7"),
    ({"offsets": longs(0, -1)}, "offsets: expected 0 to 6, found -1"),
    ({"offsets": longs(0, 7)}, "offsets: expected 0 to 6, found 7"),
    ({"offsets": longs(0, 7), "lengths": longs(0, -4)}, "offsets: expected 0 to 6, found 7"),
    ({"offsets": longs(0, -4), "lengths": longs(0, 4)}, "offsets: expected 0 to 6, found -4"),
]


@pytest.mark.parametrize(("change", "message"), OUTSIDE + MISPLACED, ids=str)
def test_what_lies_outside_is_refused(impl, change, message):
    case = {name: t.clone() for name, t in (COMMIT | change).items()}
    lengths = case["lengths"].tolist()
    with pytest.raises(IndexError, match=message):
        kv_commit(**case)
    assert (case["arena"] == 0).all() and case["lengths"].tolist() == lengths, "written before the check"
    kv_commit(**{name: t.clone() for name, t in COMMIT.items()})


def test_schema_tells_the_mutation():
    written = {a.name for a in torch.ops.stars.kv_commit.default._schema.arguments if a.alias_info is not None}
    assert written == {"arena", "lengths"}


@pytest.mark.parametrize("call", [CALLS[0], CALLS[3], CALLS[-1]])
def test_opcheck(call):
    case = make_case(**call)
    for name in ("suffix", "arena"):  # opcheck compares values, and NaN is not equal to itself
        case[name] = case[name].nan_to_num(posinf=0, neginf=0)
    torch.library.opcheck(torch.ops.stars.kv_commit.default, tuple(case[name] for name in NAMES))
