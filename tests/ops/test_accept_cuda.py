"""accept on CUDA: the kernel's threads as a grid on the host, what nvcc makes of it, and a GPU where there is one."""

import copy
import ctypes
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import get_cxx_compiler

import stars_kernels
from stars_kernels.ops import accept, backends
from stars_kernels.ops.accept import ACCEPTED, FALLBACK, NAN, RETRY, accept_ref
from stars_kernels.ops.dispatch import load_extension
from tests.ops.helpers import dtype_name, generator, moved, strided
from tests.ops.test_accept import BY_HAND, hard_case, make_case

CSRC = Path(__file__).parents[2] / "csrc"
ARCHS = ["8.0", "9.0", "10.0"]
INPUTS = ("rewards", "valid", "thresholds", "keys", "position", "first_attempt")
WRITTEN = ("best_reward", "best_attempt", "chosen", "outcome")
POISON = 77


class AcceptArgs(ctypes.Structure):
    """AcceptArgs of csrc/accept.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in INPUTS),
        ("width", ctypes.c_int64),
        ("max_attempts", ctypes.c_int64),
        ("beta", ctypes.c_double),
        ("hard", ctypes.c_bool),
        ("best_reward", ctypes.c_void_p),
        ("best_reward_stride", ctypes.c_int64),
        ("best_attempt", ctypes.c_void_p),
        ("best_attempt_stride", ctypes.c_int64),
        ("chosen", ctypes.c_void_p),
        ("outcome", ctypes.c_void_p),
    )


@pytest.fixture(scope="session")
def grid(tmp_path_factory):
    """accept_grid.cpp, compiled: the thread of the CUDA kernel, index guard included, for the host."""
    compiler = get_cxx_compiler()
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler ({compiler})")
    library = tmp_path_factory.mktemp("grid") / "accept_grid.so"
    flags = "-std=c++17 -O2 -ffp-contract=off -Wall -Wextra -Werror -shared -fPIC".split()
    source = Path(__file__).with_name("accept_grid.cpp")
    subprocess.run([compiler, *flags, f"-I{CSRC}", str(source), "-o", str(library)], check=True)
    grid = ctypes.CDLL(str(library))
    for function in (grid.accept_block, grid.accept_blocks, grid.accept_args_size):
        function.restype = ctypes.c_int64
    assert grid.accept_args_size() == ctypes.sizeof(AcceptArgs)
    return grid


def run_grid(grid, case, seed=0, surplus_blocks=1):
    """Run every thread of the grid once in shuffled order; returns what was written, by name.

    Each tensor has a row for every thread, those past the prompts full of poison.
    """
    prompts, width = case["rewards"].shape
    blocks = grid.accept_blocks(ctypes.c_int64(prompts))
    threads = torch.randperm((blocks + surplus_blocks) * grid.accept_block(), generator=generator(seed))
    given = case | {name: torch.empty(prompts, dtype=torch.int64) for name in ("chosen", "outcome")}
    rows = {}
    for name in (*INPUTS, *WRITTEN):
        rows[name] = torch.full((len(threads), *given[name].shape[1:]), POISON).to(given[name].dtype)
        rows[name][:prompts] = given[name]
    rows["best_attempt"] = strided(rows["best_attempt"])
    args = AcceptArgs(
        **{name: rows[name].data_ptr() for name in rows},
        **{name: case[name] for name in ("max_attempts", "beta", "hard")},
        width=width,
        best_reward_stride=rows["best_reward"].stride(0),
        best_attempt_stride=rows["best_attempt"].stride(0),
    )
    run = getattr(grid, f"accept_grid_{dtype_name(case['rewards'].dtype)}")
    run(
        ctypes.byref(args),
        ctypes.c_int64(prompts),
        ctypes.c_void_p(threads.data_ptr()),
        ctypes.c_int64(len(threads)),
    )
    for name in WRITTEN:
        assert (rows[name][prompts:] == POISON).all(), f"{name}: a thread past the prompts wrote"
    return {name: rows[name][:prompts] for name in WRITTEN}


def defined(case):
    """What the definition writes, by name; `case` keeps its running best."""
    case = copy.deepcopy(case)
    order = "rewards valid thresholds beta hard keys position first_attempt max_attempts best_reward best_attempt"
    chosen, outcome = accept_ref(*(case[name] for name in order.split()))
    return {name: case[name] for name in ("best_reward", "best_attempt")} | {"chosen": chosen, "outcome": outcome}


def assert_same(found, expected):
    for name in WRITTEN:
        torch.testing.assert_close(
            found[name].cpu(), expected[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("width", [1, 2, 5, 9])
def test_grid_against_the_definition(grid, width, dtype, hard):
    case = make_case(400, width, seed=width, dtype=dtype, hard=hard)
    found = run_grid(grid, case, seed=width)
    assert_same(found, defined(case))
    assert set(found["outcome"].tolist()) == {RETRY, ACCEPTED, FALLBACK, NAN}


@pytest.mark.parametrize("surplus_blocks", [0, 2])
@pytest.mark.parametrize("prompts", [0, 1, 127, 128, 129, 257])
def test_grid_of_any_size(grid, prompts, surplus_blocks):
    case = make_case(prompts, 3, seed=prompts)
    assert_same(run_grid(grid, case, seed=prompts, surplus_blocks=surplus_blocks), defined(case))


def test_grid_without_columns(grid):
    case = make_case(5, 0)
    assert_same(run_grid(grid, case), defined(case))


@pytest.mark.parametrize(("rewards", "changes", "expected"), BY_HAND)
def test_grid_by_hand(grid, rewards, changes, expected):
    found = run_grid(grid, hard_case(rewards, **changes))
    assert tuple(found[name].item() for name in ("chosen", "outcome", "best_attempt")) == expected


def test_nvcc_compiles_for_every_architecture(tmp_path):
    """Without torch, without a warning, without a spill; prints what ptxas says (pytest -s)."""
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{cuda_home}/bin{os.pathsep}{os.environ['PATH']}")
    if nvcc is None:
        pytest.skip(f"no nvcc on PATH or in {cuda_home}/bin")
    flags = "-std=c++17 -O3 -fmad=false -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -Xptxas -v".split()
    numbers = [arch.replace(".", "") for arch in ARCHS]
    flags += [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    command = [nvcc, *flags, "-c", str(CSRC / "cuda" / "accept.cu"), "-o", str(tmp_path / "accept.o")]
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # nvcc dies of `make asan`'s
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pattern = (
        r"entry function '\w+accept_kernelI(\w)\w+' for 'sm_(\d+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    report = re.findall(pattern, done.stdout + done.stderr, re.DOTALL)
    for reward, arch, stack, stores, loads, registers in report:
        dtype = {"f": "float32", "d": "float64"}[reward]
        print(f"accept {dtype} sm_{arch}: {registers} registers, stack {stack}, spill stores {stores}, loads {loads}")
        assert (stack, stores, loads) == ("0", "0", "0")
    assert {(reward, arch) for reward, arch, *_ in report} == {(r, n) for r in "fd" for n in numbers}


def test_the_extension_tells_whether_it_has_cuda():
    if load_extension() is not None:
        pytest.skip(f"no compiled extension: {load_extension()}")
    from stars_kernels import _C

    info = _C.build_info()
    recorded = json.loads(Path(stars_kernels.__file__).with_name("_build_info.json").read_text())
    if "STARS_EXPECT_CUDA" in os.environ:
        assert info["cuda"], recorded["cuda_reason"]
        assert info["cuda_archs"] == os.environ["STARS_EXPECT_CUDA"].split(";")
    assert backends()["accept"]["cuda"] == ("cuda" if info["cuda"] else "triton")
    assert recorded["cuda"] == info["cuda"] == bool(info["cuda_archs"])
    assert (recorded["cuda_reason"] is None) == info["cuda"]


@pytest.mark.gpu
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("prompts", "width"), [(0, 3), (1, 1), (129, 0), (400, 5)])
def test_on_a_gpu(prompts, width, dtype, hard):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if backends()["accept"]["cuda"] != "cuda":
        pytest.skip("the extension is built without CUDA")
    case = make_case(prompts, width, seed=width, dtype=dtype, hard=hard)
    given = moved(case, "cuda")
    given["best_attempt"] = strided(case["best_attempt"]).cuda()
    torch.cuda.set_sync_debug_mode("error")  # the host waits for nothing
    try:
        chosen, outcome = accept(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(given | {"chosen": chosen, "outcome": outcome}, defined(case))
