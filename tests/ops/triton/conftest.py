"""The Triton kernels, called directly: on a GPU, in ttsem (which pretends one), else in Triton's own interpreter."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

SANITIZED = "ttsem" in sys.modules
INTERPRETED = not torch.cuda.is_available()  # tests/conftest.py then sets TRITON_INTERPRET
GPU = not SANITIZED and not INTERPRETED


def pytest_collection_modifyitems(items):
    for item in items:
        if GPU and Path(__file__).parent in item.path.parents:
            item.add_marker("gpu")


def pytest_terminal_summary(terminalreporter, config):
    if not GPU and config.option.markexpr == "gpu":
        where = "ttsem" if SANITIZED else "Triton's interpreter"
        terminalreporter.write_line(f"tests/ops/triton: not run, there is no GPU. Without -m gpu: in {where}.")


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The names of the kernels that a test launched: at least one, or its test compared something else."""
    names = []
    for kind in (JITFunction, InterpretedFunction):
        run = kind.run

        def counted(self, *args, run=run, **kwargs):
            names.append(self.fn.__name__)
            return run(self, *args, **kwargs)

        monkeypatch.setattr(kind, "run", counted)
    yield names
    assert names, "this test launched no Triton kernel"


@pytest.fixture
def products_in_order(monkeypatch):
    """In the interpreter a product adds its terms in order, and knows bfloat16; BLAS adds by the row's place, too."""
    if not INTERPRETED:
        return

    def wide(x):
        return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype == tl.bfloat16 else x.data

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total, left, right = d.data.copy(), wide(a), wide(b)
        for k in range(left.shape[1]):
            total += np.multiply(left[:, k, None], right[k], dtype=total.dtype)
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
