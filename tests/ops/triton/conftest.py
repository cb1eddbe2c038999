"""The Triton kernels, called directly: on a GPU, in ttsem (which pretends one), else in Triton's own interpreter."""

import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction
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
