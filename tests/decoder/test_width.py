"""width="auto", wave="auto": what a round costs on each device, and the shape that follows."""

from dataclasses import replace
from math import comb, log

import pytest

from bench import counted, kernels, schedule
from bench.assumptions import values
from bench.costs import ours, round_seconds
from bench.parts import BUILT
from bench.sizes import BF16, GPUS, MODELS
from stars_kernels.decoder import width as module
from stars_kernels.decoder.width import CHOICES, AcceptanceHistory, CpuCost, GpuCost, ModelSize, Shape, best_shape

MAX_ATTEMPTS = 20
MISS = AcceptanceHistory().miss  # 3 in 4
LLAMA = ModelSize(15e9, 7.5e9, layers=32, kv_bytes=131072, state_bytes=8192, logits_bytes=256512)
H100 = GpuCost(LLAMA, (LLAMA,), segment_size=15, bandwidth=3.35e12, flops=989e12)
COSTS = {
    "CPU": CpuCost(15),
    "no model as reward, on a CPU": CpuCost(15, reads=False),
    "H100": H100,
    "eager": replace(H100, graphs=False),
    "no model as reward": replace(H100, rewards=()),
    "a function": replace(H100, rewards=(), asks=True),
    "one token": replace(H100, segment_size=1),
}


@pytest.mark.parametrize("prompts", [1, 8, 64])
@pytest.mark.parametrize("segment", [15, 30])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("gpu", ["h100", "a100"])
def test_on_a_gpu_a_round_is_nearly_the_rooflines_best(gpu, model, segment, prompts):
    job = schedule.Job(GPUS[gpu], MODELS[model], prompts, prompt_tokens=128, segment=segment, acceptance=0.25)

    def seconds(shape):
        """Modelled in full, kernel by kernel, for a decided segment."""
        kernels = ours(job, prompts, shape.width, job.middle, wave=shape.wave)
        return round_seconds(job.gpu, kernels, True, values()) / job.decided(shape.width)

    shapes = [schedule.Shape(width, wave) for width in job.widths for wave in schedule.waves_of(width)]
    assert seconds(schedule.auto_shape(job)(prompts)) <= 1.06 * min(map(seconds, shapes))


def test_the_constants_are_the_rooflines():
    given = values()
    shares = (module.BANDWIDTH_SHARE, module.FLOPS_SHARE)
    assert shares == (given.bandwidth_share, given.flops_share)
    assert (module.HOST_SECONDS, module.ISSUE_SECONDS) == (given.host_seconds, given.issue_seconds)
    assert module.LAUNCH_SECONDS == pytest.approx(given.gap_seconds + given.small_kernel_seconds)
    assert pytest.approx(log(2) / log(given.ridge), rel=0.01) == module.RIDGE
    assert module.LAYER_LAUNCHES == counted.LINEARS + sum(counted.LAYER.values()) + 1  # the attention
    assert module.LAYER_LAUNCHES - module.MERGED_LAUNCHES == counted.LINEARS - counted.MERGED_LINEARS
    llama = MODELS["llama-3-8b"]
    assert round(BUILT.bytes(llama) / (BF16 * llama.hidden)) == module.TOKEN_STATES
    draw = kernels.segment_sample(MODELS["llama-3-8b"], "", 1, 1, 1, filtered=True)
    assert module.STEP_LAUNCHES == counted.FORWARD + 1 + counted.STEP + len(draw)  # one for the LM head


def test_the_cpus_cost_would_not_do_on_a_gpu():
    on_a_cpu, on_a_gpu = (best_shape(64, MAX_ATTEMPTS, MISS, cost).width for cost in (CpuCost(15), H100))
    assert on_a_cpu == 2 < on_a_gpu == 4


def test_the_shapes_on_a_cpu():
    found = {prompts: best_shape(prompts, MAX_ATTEMPTS, MISS, CpuCost(15)) for prompts in (1, 2, 4, 8, 16, 64)}
    assert found == {1: (8, 2), 2: (6, 2), 4: (6, 2), 8: (4, 1), 16: (3, 1), 64: (2, 1)}


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
def test_monotonic(cost):
    """More rows never cost less; more prompts, or more attempts accepted, never make a round wider."""
    for part in (cost.sample, cost.score):
        costs = [part(rows) for rows in range(1, 3000)]
        assert costs == sorted(costs) and costs[0] >= 0
    assert 0 < cost.sample(1) + cost.score(1) < cost.sample(3000) + cost.score(3000)
    for miss in (0.95, 0.75, 0.2):
        widths = [best_shape(prompts, MAX_ATTEMPTS, miss, COSTS["CPU"]).width for prompts in range(1, 300)]
        assert widths == sorted(widths, reverse=True)
    for prompts in (1, 8, 64):
        widths = [best_shape(prompts, MAX_ATTEMPTS, 1 - n / 100, cost).width for n in (10, 25, 50, 75, 100)]
        assert widths == sorted(widths, reverse=True)


def test_where_scoring_is_free_or_all_is_judged_a_round_is_one_wave():
    for prompts in (1, 8, 64):
        for miss in (0.0, 0.5, 0.9, 1.0):
            assert len(set(best_shape(prompts, MAX_ATTEMPTS, miss, CpuCost(15, reads=False)))) == 1
        for cost in COSTS.values():
            assert len(set(best_shape(prompts, MAX_ATTEMPTS, 1.0, cost))) == 1


@pytest.mark.parametrize("cost", [H100, CpuCost(15), replace(H100, asks=True)], ids=["GPU", "CPU", "function"])
def test_the_cheapest_way_to_a_decision_is_taken(cost):
    """By the definition: rounds, and waves in them, of so many rows, until one is accepted or all have been tried."""

    def expected(shape, prompts, miss):
        total, happens = 0.0, 1.0
        for first in range(0, MAX_ATTEMPTS, shape.width):
            total += happens * cost.sample(prompts * shape.width)
            later = sum(1 - (1 - miss**start) ** prompts for start in range(0, shape.width, shape.wave) if start)
            total += happens * cost.judge(later if shape.wave < shape.width else None)
            for start in range(0, shape.width, shape.wave):
                size, going = min(shape.wave, shape.width - start), miss**start
                for k in range(1, prompts + 1):  # of the prompts that are still open; each has as many rows
                    chance = comb(prompts, k) * going**k * (1 - going) ** (prompts - k)
                    total += happens * chance * cost.score(k * size)
            happens = miss ** (first + shape.width)
        return total

    widths = [w for w in CHOICES if w <= MAX_ATTEMPTS]
    waves = CHOICES if cost.waves else (0,)
    shapes = [Shape(width, wave) for width in widths for wave in {*waves, width} if 0 < wave <= width]
    for prompts in (1, 5, 12):
        for miss in (0.0, 0.25, 0.5, 0.75, 1.0):
            least = min(expected(shape, prompts, miss) for shape in shapes)
            # The rows of a wave are taken at their mean, so nearly.
            assert expected(best_shape(prompts, MAX_ATTEMPTS, miss, cost), prompts, miss) <= 1.01 * least


def test_as_wide_as_attempts_are_allowed():
    assert [best_shape(1, n, 1.0, H100).width for n in (1, 5, 20, 64, 200)] == [1, 5, 20, 64, 64]


def test_a_given_width_keeps_it():
    for width in (1, 4, 7, 20):
        shape = best_shape(8, MAX_ATTEMPTS, MISS, CpuCost(15), width)
        assert shape.width == width >= shape.wave


def test_what_a_gpu_s_round_follows_from():
    """Few rows are bound by bytes, many by operations, small models by their launches where there are no graphs."""

    def total(cost, rows):
        return cost.sample(rows) + cost.score(rows)

    def quicker(cost, rows, **change):
        return total(cost, rows) / total(replace(cost, **{name: 2 * getattr(cost, name) for name in change}), rows)

    assert quicker(H100, 4, bandwidth=True) > 1.25 > 1.1 > quicker(H100, 4, flops=True)
    assert quicker(H100, 4000, flops=True) > 1.5 > 1.2 > quicker(H100, 4000, bandwidth=True)
    small = replace(LLAMA, weights=1e6, parameters=5e5, kv_bytes=1024, logits_bytes=1024)
    eager = replace(H100, model=small, rewards=(small,), graphs=False)
    assert total(eager, 1) == total(eager, 50) > 3 * total(replace(eager, graphs=True), 1)
