"""width="auto": what a round costs on each device, and the width that follows."""

from dataclasses import replace
from math import log

import pytest

from bench import kernels
from bench.assumptions import values
from bench.costs import ours, round_seconds
from bench.kernels import GPUS, MODELS
from bench.schedule import Job, auto_width
from stars_kernels.decoder import width as module
from stars_kernels.decoder.width import CHOICES, AcceptanceHistory, GpuCost, ModelSize, cpu_cost

MAX_ATTEMPTS = 20
LLAMA = ModelSize(15e9, 7.5e9, layers=32, kv_bytes=131072, state_bytes=8192, logits_bytes=256512)
H100 = GpuCost(LLAMA, (LLAMA,), segment_size=15, bandwidth=3.35e12, flops=989e12)
COSTS = {
    "CPU": cpu_cost,
    "H100": H100,
    "eager": replace(H100, graphs=False),
    "no model as reward": replace(H100, rewards=()),
    "one token": replace(H100, segment_size=1),
}


@pytest.mark.parametrize("prompts", [1, 8, 64])
@pytest.mark.parametrize("segment", [15, 30])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("gpu", ["h100", "a100"])
def test_on_a_gpu_a_round_is_nearly_the_rooflines_best(gpu, model, segment, prompts):
    job = Job(GPUS[gpu], MODELS[model], prompts, prompt_tokens=128, segment=segment, acceptance=0.25)

    def seconds(width):
        """Modelled in full, kernel by kernel, for a decided segment."""
        kernels = ours(job, prompts, width, job.middle)
        return round_seconds(job.gpu, kernels, True, values()) / job.decided(width)

    assert seconds(auto_width(job)(prompts, job.middle)) <= 1.05 * min(map(seconds, job.widths))


def test_the_constants_are_the_rooflines():
    given = values()
    shares = (module.BANDWIDTH_SHARE, module.FLOPS_SHARE)
    assert shares == (given.bandwidth_share, given.flops_share)
    assert (module.HOST_SECONDS, module.ISSUE_SECONDS) == (given.host_seconds, given.issue_seconds)
    assert module.LAUNCH_SECONDS == pytest.approx(given.gap_seconds + given.small_kernel_seconds)
    assert pytest.approx(log(2) / log(given.ridge), rel=0.01) == module.RIDGE
    assert (module.STEP_LAUNCHES, module.L2_BYTES) == (kernels.STEP_LAUNCHES, kernels.L2_BYTES)


def test_the_cpus_cost_would_not_do_on_a_gpu():
    history = AcceptanceHistory()
    assert history.best_width(64, MAX_ATTEMPTS, cpu_cost) == 1 < history.best_width(64, MAX_ATTEMPTS, H100)


def test_the_widths_on_a_cpu():
    history = AcceptanceHistory()  # starts at 1 in 4
    found = {prompts: history.best_width(prompts, MAX_ATTEMPTS, cpu_cost) for prompts in (1, 2, 4, 8, 16, 64)}
    assert found == {1: 6, 2: 4, 4: 4, 8: 3, 16: 2, 64: 1}


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
def test_monotonic(cost):
    """More rows never cost less; more prompts, or more attempts accepted, never make a round wider."""
    costs = [cost(rows) for rows in range(1, 3000)]
    assert costs == sorted(costs) and costs[0] > 0 and costs[-1] > costs[0]
    for history in (AcceptanceHistory(100, 5), AcceptanceHistory(), AcceptanceHistory(100, 80)):
        widths = [history.best_width(prompts, MAX_ATTEMPTS, cpu_cost) for prompts in range(1, 300)]
        assert widths == sorted(widths, reverse=True)
    for prompts in (1, 8, 64):
        widths = [AcceptanceHistory(100, n).best_width(prompts, MAX_ATTEMPTS, cost) for n in (10, 25, 50, 75, 100)]
        assert widths == sorted(widths, reverse=True)


def test_the_cheapest_way_to_a_decision_is_taken():
    """By the definition: rounds of so many rows until an attempt is accepted, or all have been tried."""

    def expected(width, prompts, miss):
        seconds, happens, attempts = 0.0, 1.0, 0
        while attempts < MAX_ATTEMPTS:
            seconds += happens * H100(prompts * width)
            attempts += width
            happens *= miss**width
        return seconds

    for prompts in (1, 5, 30, 200):
        for accepted in (0, 1, 2, 3, 4):
            widths = [w for w in CHOICES if w <= MAX_ATTEMPTS]
            best = min(widths, key=lambda w: expected(w, prompts, 1 - accepted / 4))
            assert AcceptanceHistory(4, accepted).best_width(prompts, MAX_ATTEMPTS, H100) == best


def test_as_wide_as_attempts_are_allowed():
    history = AcceptanceHistory(1000, 1)
    assert [history.best_width(1, attempts, H100) for attempts in (1, 5, 20, 64, 200)] == [1, 5, 20, 64, 64]


def test_what_a_gpu_s_round_follows_from():
    """Few rows are bound by bytes, many by operations, small models by their launches where there are no graphs."""

    def quicker(cost, rows, **change):
        return cost(rows) / replace(cost, **{name: 2 * getattr(cost, name) for name in change})(rows)

    assert quicker(H100, 4, bandwidth=True) > 1.25 > 1.1 > quicker(H100, 4, flops=True)
    assert quicker(H100, 4000, flops=True) > 1.5 > 1.2 > quicker(H100, 4000, bandwidth=True)
    small = replace(LLAMA, weights=1e6, parameters=5e5, kv_bytes=1024, logits_bytes=1024)
    eager = replace(H100, model=small, rewards=(small,), graphs=False)
    assert eager(1) == eager(50) > 3 * replace(eager, graphs=True)(1)
