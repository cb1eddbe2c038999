"""The pytest plugin of `make sanitize`: ttsem executes every launch on the CPU, and fails the test of a bad one.

As in `python -m ttsem.sanitize pytest`, but in every process of pytest-xdist, and a launch that was not checked for
races fails its test, as a skip does.
"""

import pytest
from ttsem import harness, sanitize

harness.mlir.enable_generic_printing()  # what Triton then caches ttsem can read
SESSION = sanitize.session()
STATE = SESSION.__enter__()  # now: conftest.py asks for a GPU


def pytest_unconfigure():
    SESSION.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def races_checked():
    before = STATE.races_unchecked
    yield
    unchecked = STATE.races_unchecked - before
    assert not unchecked, f"{unchecked} launches too large to be checked for races"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    if report.skipped:
        report.outcome = "failed"
    return report
