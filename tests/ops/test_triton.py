"""Of the Triton kernels what has no place in tests/ops/triton, which ttsem runs with a copy of each tensor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stars_kernels.ops.triton.segment_sample import segment_sample_triton
from tests.ops.helpers import generator, longs
from tests.ops.test_segment_sample import NO_FILTER, rows_of

ROOT = Path(__file__).parents[2]
TESTS = """
import torch
from stars_kernels.ops.triton.reward_head import reward_head_triton
from stars_kernels.ops.reward_head import reward_head_ref


def arguments(device):
    hidden, last = torch.ones(2, 1, 8, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    return hidden, last, torch.ones(8, device=device), None, None, 1e-5


def test_the_kernel(device):
    assert reward_head_triton(*arguments(device)).tolist() == [8, 8]


def test_the_definition(device):
    assert reward_head_ref(*arguments(device)).tolist() == [8, 8]
"""


def test_a_test_without_a_launch_fails(tmp_path):
    """By the fixture of tests/ops/triton/conftest.py."""
    file = tmp_path / "test_launches.py"
    file.write_text(TESTS)
    plugins = ["-p", "tests.conftest", "-p", "tests.ops.triton.conftest", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-rA", *plugins, file.name]
    run = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "this test launched no Triton kernel" in run.stdout
    results = {
        line.split(" - ")[0] for line in run.stdout.splitlines() if line.startswith(("PASSED", "ERROR", "FAILED"))
    }
    assert results == {
        "PASSED test_launches.py::test_the_kernel",
        "PASSED test_launches.py::test_the_definition",
        "ERROR test_launches.py::test_the_definition",  # when the fixture ends
    }


@pytest.mark.parametrize(
    ("filters", "source"), [({}, None), ({"top_k": 9, "top_p": 0.9}, longs(3, 0, 2, 1))], ids=["own rows", "source"]
)
def test_rows_beyond_2_to_the_31_elements(monkeypatch, filters, source):
    """Four rows far apart in 6 GiB, of which nothing else is touched."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    filters = (NO_FILTER | filters).values()
    draws = [t if t is None else t.to(device) for t in (*rows_of(4), source)]
    near = torch.randn(4, 40, generator=generator(12)).half().to(device)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = torch.empty(3 * 2**30 + 40, dtype=torch.float16, device=device).as_strided((4, 40), (2**30, 1)).copy_(near)
    for mine, other in zip(*(segment_sample_triton(t, *draws, *filters, 0) for t in (far, near)), strict=True):
        assert torch.equal(mine, other)
