import pytest

from tests.decoder import enumerable


@pytest.fixture(scope="module")
def world():
    return enumerable.make_world()
