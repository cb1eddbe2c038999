"""The contestants of `python -m bench decode` under pytest-benchmark: pytest bench --benchmark-only."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.decode import CONTESTANTS, Job, check_exact, make_job, ours


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest) -> Job:
    check_exact()  # never time contestants that disagree
    made = make_job(request.config.getoption("--model"), prompts=8)
    ours(made.cut(prompts=1, segments=1))  # makes the engine
    return made


@pytest.mark.parametrize("name", CONTESTANTS)
def test_one_prompt(benchmark: BenchmarkFixture, job: Job, name: str) -> None:
    one = job.cut(prompts=1, segments=1)
    (result,) = benchmark.pedantic(CONTESTANTS[name], args=(one,), rounds=1, warmup_rounds=0)
    assert len(result.token_ids) == one.config.segment_size


@pytest.mark.parametrize("name", ["batched", "ours"])
def test_eight_prompts(benchmark: BenchmarkFixture, job: Job, name: str) -> None:
    many = job.cut(prompts=8, segments=1)
    results = benchmark.pedantic(CONTESTANTS[name], args=(many,), rounds=1, warmup_rounds=0)
    assert [len(result.token_ids) for result in results] == [many.config.segment_size] * 8
