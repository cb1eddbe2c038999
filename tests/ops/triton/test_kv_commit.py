import pytest
import torch

from stars_kernels.ops.triton.kv_commit import kv_commit_triton
from tests.ops.helpers import DTYPES, bits_of, dtype_name, longs, moved
from tests.ops.test_kv_commit import CALLS, COMMIT, MISPLACED, expected_after, make_case


def assert_commits(case, device):
    arena, lengths = expected_after(case)
    given = moved(case, device)
    kv_commit_triton(**given)
    assert torch.equal(bits_of(given["arena"].cpu()), bits_of(arena))
    assert torch.equal(given["lengths"].cpu(), lengths)
    for name in set(case) - {"arena", "lengths"}:
        assert torch.equal(bits_of(given[name].cpu()), bits_of(case[name])), f"{name} was written"


@pytest.mark.parametrize("call", [call for call in CALLS if call.id != "no prompts"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_commit(device, dtype, call, launches):
    assert_commits(make_case(dtype, **call), device)
    assert launches == ["_commit"]  # all layers, and the lengths


@pytest.mark.parametrize("change", [change for change, _ in MISPLACED], ids=str)
def test_a_misplaced_commit_is_left_out(device, change):
    """Several programs take its length; the commit beside it is done."""
    case = COMMIT | {"suffix": torch.ones(3, 2, 2, 3, 8, 64), "arena": torch.zeros(3, 2, 6, 8, 64)} | change
    beside = {"prompt": longs(0), "row": longs(0), "count": longs(1)}
    arena, lengths = expected_after(case | beside)
    both = {name: torch.cat((t, case[name])) for name, t in beside.items()}
    given = moved(case | both | {"advance": torch.tensor([True, True])}, device)
    given["lengths"] = given["lengths"].clone()
    kv_commit_triton(**given)
    assert torch.equal(given["arena"].cpu(), arena) and torch.equal(given["lengths"].cpu(), lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("size", [64, 33])
def test_a_segment_of_several_blocks(device, dtype, size):
    """Heads of 16-byte words, and of odd ones, in copies longer than one program's."""
    case = make_case(dtype)
    case["suffix"] = torch.randn(2, 2, 7, 6, 16, size).to(dtype)
    case["arena"] = torch.randn(2, 2, 40, 16, size).to(dtype)
    assert_commits(case, device)


def test_a_cut_of_a_larger_arena(device):
    """Planes that lie apart: some layers of a cache, rows of a larger suffix."""
    case = make_case(torch.float32)
    case["arena"] = torch.cat((case["arena"], case["arena"]), dim=2)[:, :, :40]
    case["suffix"] = torch.cat((case["suffix"], case["suffix"]), dim=2)[:, :, 3:10]
    for name in ("prompt", "row", "count", "lengths", "offsets"):
        case[name] = torch.stack((case[name], case[name]), dim=-1)[:, 0]
    arena, lengths = expected_after(case)
    given = moved(case, device)
    given["arena"] = torch.cat((given["arena"], given["arena"]), dim=2)[:, :, :40]  # a copy would be contiguous
    kv_commit_triton(**given)
    assert torch.equal(bits_of(given["arena"].cpu()), bits_of(arena)) and torch.equal(given["lengths"].cpu(), lengths)


@pytest.mark.parametrize("shape", [(0, 2, 7, 6, 2, 5), (3, 2, 7, 0, 2, 5)], ids=str)
def test_lengths_move_where_there_is_nothing_to_copy(device, shape):
    case = make_case(torch.float32) | {"suffix": torch.empty(shape), "arena": torch.empty(*shape[:2], 40, *shape[4:])}
    if shape[3] == 0:
        case["count"] = torch.zeros_like(case["count"])
    assert_commits(case, device)


def test_suffix_strides_of_any_order(device):
    case = make_case(torch.float32)
    case["suffix"] = case["suffix"].permute(5, 4, 3, 2, 1, 0).contiguous().permute(5, 4, 3, 2, 1, 0)
    assert_commits(case, device)
