"""Shared fixtures: tiny random models, and the demo's real ones where their package is installed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():  # before a kernel is defined: Triton then runs it in its interpreter, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bench import interpreter
from tests.tiny import tiny_language_model, tiny_reward_model

if find_spec("triton"):
    interpreter.mend()


LONGEST = ("test_docs.py", "test_exactness.py")
"""Files that take longest; each is run by one process, so it had better not be the last."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # the tests' tensors are tiny


@pytest.fixture(scope="session")
def lm():
    return tiny_language_model()


@pytest.fixture(scope="session")
def rm():
    return tiny_reward_model()
