"""A pytest plugin for lack of time: `-p tests.thinned --every 3` takes the 1st, 4th, 7th ... case of each test."""

from collections import Counter


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="take one in N of each test's cases")


def pytest_report_header(config):
    return f"of each test's cases, one in {config.getoption('every')}"


def pytest_collection_modifyitems(config, items):
    seen, chosen, others = Counter(), [], []
    for item in items:
        test = item.path, getattr(item, "originalname", item.name)
        (others if seen[test] % config.getoption("every") else chosen).append(item)
        seen[test] += 1
    config.hook.pytest_deselected(items=others)
    items[:] = chosen
