import pytest

from bench import models


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--model", choices=models.MODELS, default="smol", help="model of the benchmarks")
