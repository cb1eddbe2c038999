"""Floors, launches, graphs and bands of `python -m bench roofline`, against counts by hand and by the code itself."""

import math
from dataclasses import fields, replace

import pytest
import torch

from bench import assumptions, costs, kernels, rivals, roofline, variants
from bench.assumptions import ASSUMPTIONS, ENDS, Values, perfect, values
from bench.kernels import GPUS, MODELS, Kernel, Model, smooth_max
from bench.schedule import Job, Round, best_width
from stars_kernels.decoder.protocols import Rows
from stars_kernels.hf.cache import open_cache
from stars_kernels.hf.proposing.graphs import SegmentGraphs, bucket_of, padded
from stars_kernels.ops.triton import fork_attention
from tests.launch_count import Launches, llama_view
from tests.ops.test_fork_attention import make_case

TINY = Model("tiny", layers=2, hidden=8, heads=4, kv_heads=2, head_dim=2, intermediate=16, vocabulary=5000)
H100 = GPUS["h100"]
JOBS = [
    Job(H100, MODELS[name], prompts, prompt_tokens=128, segment=15, acceptance=0.25)
    for name, prompts in (("llama-3-8b", 64), ("qwen2.5-0.5b", 64), ("qwen2.5-0.5b", 1))
]
GIVEN = values()


# Floors: bytes by hand, of 3 rows


def floor(kernel):
    """Seconds of a call at 100 % of an H100's memory."""
    return kernel.limits(H100, replace(GIVEN, bandwidth_share=1.0))["memory"]


def test_floors_of_segment_sample():
    race, finish = kernels.segment_sample(TINY, "", 3, 3, 1, filtered=False)
    logits = 3 * 5000 * 2
    parts = 3 * 3 * (4 + 4 + 8)  # three chunks a row: id, maximum, mass
    assert (race.bytes, finish.bytes) == (logits + parts, parts + 3 * (4 + 8))  # a log-probability and a token
    assert floor(race) == pytest.approx((logits + parts) / 3.35e12)
    groups, bound, gather, draw = kernels.segment_sample(TINY, "", 3, 3, 1, filtered=True)
    maxima = 3 * 79 * 4  # of 64 tokens each
    candidates = 3 * 1024 * 8
    assert groups.bytes == logits + maxima
    assert bound.bytes == maxima + 3 * 20  # best, bound, mass, count
    assert gather.bytes == logits + maxima + candidates
    assert draw.bytes == candidates + 3 * 12
    assert [k.searches for k in (groups, bound, gather, draw)] == [0, 1, 0, 1]


def test_floors_of_the_other_kernels():
    race, finish = kernels.lm_head_sample(TINY, "", 3, 1)
    parts = 3 * 40 * (4 + 4 + 4 + 8)
    assert race.bytes == 2 * (5000 * 8 + 3 * 8) + parts and finish.bytes == parts + 3 * 12
    assert race.flops == 2 * 5000 * 8 * 3
    assert kernels.kv_commit(TINY, "", 5).bytes == 2 * 5 * (2 * 2 * 2 * 2 * 2)  # layers, k and v, heads, size, bf16
    assert kernels.reward_head(TINY, "", 3).bytes == 3 * 8 * 2 + 8 * 2 + 3 * 4


def test_floors_of_fork_attention():
    at = dict(prefixes=1, prefix=100.0, own=7.0, calls=1)
    (one,) = kernels.fork_attention(TINY, "", 3, 1, **at)
    keys, queries = (100 + 3 * 7) * 2 * 2 * 2 * 2, 3 * 4 * 2 * 2
    assert one.bytes == keys + 2 * queries
    assert one.flops == 2 * 2 * 3 * 4 * 2 * 107
    split, merge = kernels.fork_attention(TINY, "", 3, 1, splits=2, **at)
    partial = 2 * 3 * 4 * (2 + 1 + 1) * 4  # accumulator, maximum and sum in fp32
    assert split.bytes == keys + queries + partial and merge.bytes == partial + queries


def test_the_ridge_costs_its_factor_and_nothing_far_from_it():
    assert smooth_max((1.0, 1.0), 1.3) == pytest.approx(1.3)
    assert smooth_max((1.0, 0.01), 1.3) == pytest.approx(1.0, rel=1e-4)
    assert smooth_max((2.0, 0.0), 1.3) == 2.0 and smooth_max((0.0, 0.0), 1.3) == 0.0
    assert smooth_max((1.0, 3.0), 1.0) == 3.0
    assert smooth_max((1.0, 3.0), 2.0) == pytest.approx(4.0)  # the sum


def test_no_launch_is_shorter_than_the_smallest_kernel_nor_a_search():
    empty = Kernel("", 0, calls=3, launches=5)
    assert empty.seconds(H100, GIVEN) == pytest.approx(15 * GIVEN.small_kernel_seconds)
    assert empty.seconds(H100, perfect(GIVEN)) == 0
    assert Kernel("", 0, searches=1).seconds(H100, GIVEN) == GIVEN.search_seconds
    half = Kernel("", H100.bandwidth, attention=True)
    assert half.seconds(H100, GIVEN) == pytest.approx(1 / GIVEN.bandwidth_share / GIVEN.attention_share)


# Launches: those of the code


def launched(layers, prompts):
    """Launches by op of a prefill of so many prompts, by a Llama of so many layers; no views, no empty tensors."""
    view = llama_view(layers)
    cache = open_cache(view, [8] * prompts, 4)
    with torch.no_grad(), Launches() as count, cache.prefill(list(range(prompts)), [3] * prompts) as inputs:
        view(input_ids=torch.ones(1, 3 * prompts, dtype=torch.long), logits_to_keep=1, **inputs)
    return count.seen


def test_launches_of_a_prefill_are_those_of_the_cache():
    layer = launched(2, 1) - launched(1, 1)
    assert layer == launched(2, 2) - launched(1, 2)  # however many prompts
    assert layer.pop("fork_attention") == 1
    linears = sum(layer.pop(name, 0) for name in ("linear", "mm", "addmm"))
    assert (linears, sum(layer.values())) == (kernels.LINEARS, kernels.PREFILL_ELEMENTWISE), layer


def test_launches_of_a_prefill_in_sum():
    job = JOBS[0]  # 64 prompts of 128 tokens: 8 forwards of 1,024 for each model, 32 layers
    a_layer = 7 + kernels.PREFILL_ELEMENTWISE + 1  # the attention
    forwards = 2 * 8 * (32 * a_layer + kernels.STEP_LAUNCHES) + 8  # and the LM head
    assert costs.launches(costs.prefill(job)) == forwards
    short = replace(job, prompt_tokens=4)  # 256 would fit by their tokens, 64 are taken
    assert costs.launches(costs.prefill(short)) * 8 == forwards


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in Triton's interpreter")
@pytest.mark.parametrize(("prompts", "prefix", "steps"), [(1, 300, 1), (1, 1100, 1), (3, 600, 1), (1, 1100, 15)])
def test_fork_attention_is_launched_in_as_many_splits(monkeypatch, prompts, prefix, steps):
    seen = []
    for name, splits_of in (("_fork_attention", lambda grid, args: grid[2]), ("_merge", lambda grid, args: args[6])):

        class Fake:
            def __init__(self, name=name, splits_of=splits_of):
                self.name, self.splits_of = name, splits_of

            def __getitem__(self, grid):
                return lambda *args, **options: seen.append((self.name, self.splits_of(grid, args)))

        monkeypatch.setattr(fork_attention, name, Fake())
    rows = [p for p in range(prompts) for _ in range(4)]
    case = make_case(
        steps=steps, shape=(4, 2, 16, 16), dtype=torch.bfloat16, lengths=(prefix,) * prompts, prompt=rows,
        suffix_len=[steps] * len(rows), query_len=[steps] * len(rows),
    )  # fmt: skip
    slots = case["arena_key"].shape[0] / prompts
    fork_attention.fork_attention_triton(**{"window": 0, "softcap": 0.0, "sinks": None} | case)
    model = replace(TINY, heads=4, kv_heads=2, head_dim=16)
    splits = kernels.attention_splits(model, prompts, len(rows), steps, slots)
    modelled = kernels.fork_attention(
        model, "", len(rows), steps, prefixes=1, prefix=prefix, own=1, calls=1, splits=splits
    )
    assert [s for _, s in seen] == [splits] * len(modelled)
    assert (prefix < 512) == (splits == 1)


def test_graphs_of_a_batch_are_those_of_the_code():
    """The same rounds through SegmentGraphs, with a stand-in for the capture: which are eager, captured, replayed."""
    job = replace(JOBS[1], prompts=8)
    counts = [(64, 2), (64, 2), (40, 3), (64, 2), (40, 3), (9, 4), (80, 4), (64, 2), (64, 2), (9, 4)]
    rounds = [Round(1.0, prompts, width, 150.0) for prompts, width in counts]
    batch = variants.as_built(job, rounds)
    seen = []

    def capture(run):
        seen.append("captured")
        return run

    graphs, peak, expected = SegmentGraphs(capture), 0, []
    for prompts, width in counts:
        one = torch.zeros(prompts * width, dtype=torch.int64)
        wide = padded(Rows(one.tolist(), one, one, one, one), bucket_of(len(one)))
        peak = max(peak, len(wide))  # the buffers grow with the largest round
        before = len(seen), graphs.replays
        graphs.run(lambda rows: rows.slot[:, None], wide, "settings", peak)
        expected.append((graphs.replays > before[1], len(seen) > before[0]))
    assert [(s.graph, s.captured) for s in batch.steps] == expected
    assert batch.counts == {"rounds": 10, "eager": sum(not g for g, _ in expected), "capturing": len(seen)}
    spent = batch.seconds(GIVEN)
    nodes = costs.launches([k for k in batch.steps[0].kernels if k.graphed])
    assert spent.captures == pytest.approx(len(seen) * nodes * (GIVEN.issue_seconds + GIVEN.node_seconds), rel=0.1)


# Bands and contestants


def test_every_assumption_has_ends_in_order_and_a_source():
    assert list(ASSUMPTIONS) == [f.name for f in fields(Values)]
    falls = {"bandwidth_share", "flops_share", "attention_share", "l2_speed"}  # more is faster
    for name, a in ASSUMPTIONS.items():
        ends = [a.fast, a.middle, a.slow]
        assert ends == sorted(ends, reverse=name in falls) and len(set(ends)) == 3, name
        assert a.source.startswith((assumptions.ELSEWHERE, assumptions.ESTIMATE)) and a.unit, name
    assert values("slow", "fast").bandwidth_share == 0.7 and values("slow", "fast").gap_seconds == 1e-6


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job.model.name}-{job.prompts}")
def test_bands_are_in_order_and_the_rivals_too(job):
    found = variants.contestants(job)
    for name, contestant in found.items():
        assert contestant.band.low < contestant.band.middle < contestant.band.high, name
    for mine, rival in roofline.RATIOS:
        band = found[mine].against(found[rival])
        assert band.low < band.middle < band.high
        assert band.middle == pytest.approx(found[mine].band.middle / found[rival].band.middle)
    for end in ENDS:
        given = values(end, end)
        plain = found["vLLM"].speed(given)
        assert found["vLLM, L2"].speed(given) >= plain > found["vLLM, requests"].speed(given)
        assert found["graphs kept"].speed(given) > found["tuned"].speed(given)
    assert found["waves"].speed(GIVEN) >= found["graphs kept"].speed(GIVEN) * (1 - 1e-9)
    assert found["fused"].speed(GIVEN) > found["graphs kept"].speed(GIVEN)
    assert found["shipped"].speed(GIVEN) <= found["tuned"].speed(GIVEN)


@pytest.mark.parametrize("width", [1, 2, 8, 20])
@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job.model.name}-{job.prompts}")
def test_l2_is_never_slower(job, width):
    def seconds(rival, given):
        return rivals.vllm_seconds(
            H100, rivals.vllm(job, job.prompts, width, 200.0, rival), job.prompts * width, given, rival
        )

    plain, l2 = rivals.RIVALS[:2]
    for shared in ENDS:
        for own in ENDS:
            given = values(shared, own)
            assert seconds(l2, given) <= seconds(plain, given) * (1 + 1e-12)
    if width == 1:  # no row shares its prefix
        assert seconds(l2, GIVEN) == pytest.approx(seconds(plain, GIVEN))


def test_waves_score_fewer_rows_and_the_same_rounds():
    job = JOBS[0]

    def rows(wave):
        head = [k for k in costs.ours(job, 64, 4, 200.0, wave=wave) if "reward_head" in k.name]
        return sum(k.vector_flops for k in head) / (2 * job.model.hidden)

    assert rows(None) == rows(4) == 256
    assert rows(1) == pytest.approx(64 + 64 * 0.75 * 3)
    assert rows(2) == pytest.approx(128 + 64 * 0.75**2 * 2)
    phases = {k.phase for k in costs.ours(job, 64, 4, 200.0, wave=2)}
    assert phases == {"last token", "segment", "RM", "RM, second wave"}
    whole, waves = (costs.ours(job, 64, 4, 200.0, wave=w) for w in (4, 2))

    def bytes_of(found):
        return sum(k.bytes * k.calls for k in found if "kv_commit" in k.name or k.phase == "segment")

    assert bytes_of(whole) == pytest.approx(bytes_of(waves))


def test_the_best_width_is_the_cheapest():
    job = JOBS[0]
    assert best_width(job, lambda prompts, width, prefix: 1.0)(64, 0.0) == max(job.widths)
    assert best_width(job, lambda prompts, width, prefix: width**2)(64, 0.0) == 1
    assert math.isclose(job.decided(20), 1)
