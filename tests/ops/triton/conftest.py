"""The Triton kernels, called directly: on a GPU, in ttsem (which pretends one), else in Triton's own interpreter."""

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

INTERPRETED = not torch.cuda.is_available()  # tests/conftest.py then sets TRITON_INTERPRET


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
