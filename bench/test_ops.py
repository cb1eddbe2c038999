"""The cases of `python -m bench ops` under pytest-benchmark: pytest bench --benchmark-only."""

from __future__ import annotations

import itertools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.ops import Case, attention_case, commit_case, decision_case, head_case, linear_case, sampling_case

CASES = {
    "fork_attention": lambda: attention_case(9, 3, 64, 128, 1, torch.float32),
    "segment_sample": lambda: sampling_case(49_152, "temperature, top-k, top-p", torch.float32),
    "kv_commit": lambda: commit_case(torch.float32),
    "accept": lambda: decision_case(8),
    "packed_linear": lambda: linear_case(8, 576, 576, torch.float32),
    "reward_head": lambda: head_case(torch.float32),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    case = CASES[request.param]()
    case.check(0)
    return case


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_op(benchmark: BenchmarkFixture, case: Case, whose: str) -> None:
    layer = itertools.cycle(range(case.layers))
    work = getattr(case, whose)
    benchmark.pedantic(lambda: work(next(layer)), rounds=20, warmup_rounds=2)
