"""Floors, launches, graphs and bands of `python -m bench roofline`, against counts by hand and by the code itself."""

import itertools
import math
from dataclasses import fields, replace

import pytest
import torch

from bench import assumptions, costs, counted, kernels, parts, rivals, roofline, variants
from bench.assumptions import ASSUMPTIONS, ENDS, Values, perfect, values
from bench.kernels import Kernel, smooth_max
from bench.parts import BUILT, PARTS, WHOLE, Engine
from bench.schedule import Job, Round, Shape, best_shape, waves
from bench.sizes import GPUS, MODELS, Model, merges
from stars_kernels import ops
from stars_kernels.decoder.protocols import Rows
from stars_kernels.hf.proposing.graphs import Graphs, bucket_of, padded
from stars_kernels.ops.triton import fork_attention

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
    whole, merge = kernels.fork_attention(TINY, "", 3, 1, splits=4, **at)  # one split of a prefix is not stored
    assert whole == one and merge.bytes == 0
    split, merge = kernels.fork_attention(TINY, "", 3, 1, splits=4, **at | {"prefix": 300.0})
    keys += 200 * 2 * 2 * 2 * 2
    partial = (2 + 1) * 3 * 4 * (2 + 1 + 1) * 4  # two splits and the suffix: accumulator, maximum and sum in fp32
    assert split.bytes == keys + queries + partial and merge.bytes == partial + queries


def test_bytes_are_those_of_the_tensors_that_ops_are_given():
    """Parts of them that are read, and what is written, in bf16."""
    m, rows, steps, held, prefix, capacity = TINY, 6, 3, 5, 20, 32

    def size(*tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    def empty(*shape):
        return torch.empty(shape, dtype=torch.bfloat16)

    arena, suffix = empty(m.layers, 2, 2 * capacity, m.kv_heads, m.head_dim), empty(m.layers, 2, rows, held, 2, 2)
    query = empty(rows, steps, m.heads, m.head_dim)
    out = fork_attention_op(query, *suffix[0], *arena[0], rows, prefix, capacity)
    prefixes = [arena[0, :, p * capacity : p * capacity + prefix] for p in range(2)]
    (attention,) = kernels.fork_attention(m, "", rows, steps, prefixes=2, prefix=prefix, own=held, calls=1)
    assert attention.bytes == size(query, out, suffix[0], *prefixes)
    assert kernels.kv_commit(m, "", 7).bytes == 2 * size(suffix.flatten(2, 3)[:, :, :7])  # read and written
    hidden, weight = empty(rows, steps, m.hidden), empty(m.hidden)
    last = torch.zeros(rows, dtype=torch.int64)
    reward = ops.reward_head(hidden, last, weight)
    assert kernels.reward_head(m, "", rows).bytes == size(hidden[:, 0], weight, reward)
    head, state = empty(m.vocabulary, m.hidden), empty(rows, m.hidden)
    assert kernels.lm_head(m, "", rows, 1).bytes == size(head, state, torch.nn.functional.linear(state, head))


def fork_attention_op(query, suffix_key, suffix_value, arena_key, arena_value, rows, prefix, capacity):
    """Two prompts of so many tokens, the rows shared out between them; each row holds its whole suffix."""
    prompt = torch.arange(2)
    return ops.fork_attention(
        query, suffix_key, suffix_value, torch.full((rows,), suffix_key.shape[1]),
        torch.full((rows,), query.shape[1]), arena_key, arena_value, prompt * capacity,
        torch.full_like(prompt, prefix), prompt.repeat_interleave(rows // 2), scale=1.0,
    )  # fmt: skip


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


def test_launches_of_a_prefill_in_sum():
    job = JOBS[0]  # 64 prompts of 128 tokens: 8 forwards of 1,024 for each model, 32 layers
    a_layer = counted.LINEARS + counted.PREFILL_ELEMENTWISE + 1  # the attention
    around = counted.PREFILL + 1 + counted.PREFILL_REWARD + 1  # the LM head, reward_head
    forwards = 8 * (2 * (32 * a_layer + counted.FORWARD) + around)
    assert costs.launches(costs.prefill(job)) == forwards
    short = replace(job, prompt_tokens=4)  # 256 would fit by their tokens, 64 are taken
    assert costs.launches(costs.prefill(short)) * 8 == forwards


def test_fork_attention_makes_room_for_as_many_parts():
    model = replace(TINY, heads=8, kv_heads=2, head_dim=64)
    found = set()
    for prompts, steps, width, slots in itertools.product((1, 3, 64), (1, 15), (1, 4, 20, 33), (80, 300, 3000)):
        rows, per_row = prompts * width, steps * 4
        cut = fork_attention.plan(rows, prompts, prompts * slots, per_row, 2, 64, kernels.QUERY_BLOCK)
        splits = kernels.attention_splits(model, prompts, rows, steps, slots)
        assert splits == max(1, cut.stored)
        blocks = -(-rows // cut.together) * cut.row_blocks
        assert prompts > 1 or blocks == kernels.prefix_reads(model, width, steps)
        modelled = kernels.fork_attention(
            model, "", rows, steps, prefixes=blocks, prefix=200.0, own=1, calls=1, splits=splits
        )
        assert len(modelled) == 1 + bool(cut.stored)
        found.add(splits > 1)
    assert found == {False, True}


def test_graphs_of_a_batch_are_those_of_the_code():
    """The same rounds through Graphs, with a stand-in for the capture: which of them capture a step."""
    job = replace(JOBS[1], prompts=8)
    counts = [(64, 2), (64, 2), (40, 3), (64, 2), (40, 3), (9, 4), (80, 4), (64, 2), (64, 2), (9, 4)]
    rounds = [Round(1.0, prompts, Shape(width, width), 150.0) for prompts, width in counts]
    (batch,) = variants.as_built([(job, rounds)])
    seen = []

    def capture(run):
        seen.append("captured")
        return run

    graphs, buffers, expected = Graphs(capture), [torch.empty(0)], []
    for prompts, width in counts:
        one = torch.zeros(prompts * width, dtype=torch.int64)
        wide = padded(Rows(one.tolist(), one, one, one, one), bucket_of(len(one)))
        if len(wide) > len(buffers[-1]):  # they grow with the largest round
            buffers.append(torch.empty(len(wide)))
        before = len(seen)
        graphs.keep(buffers[-1])
        for _ in range(job.segment - 1):
            graphs.run(len(wide), lambda: None)
        expected.append(len(seen) > before)
    assert [s.captured for s in batch.steps] == expected and all(s.graph for s in batch.steps)
    assert batch.counts == {"rounds": 10, "eager": 0, "capturing": len(seen)}
    spent, kernels = batch.seconds(GIVEN), batch.steps[0].kernels
    a_step = sum(k.calls * k.launches for k in kernels if k.graph == "step") / (job.segment - 1)
    others = sum(k.calls * k.launches for k in kernels if k.graph not in ("", "step"))
    nodes = a_step + others
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
        plain = found["vLLM, waves"].speed(given)
        assert found["vLLM, waves, L2"].speed(given) >= plain > found["vLLM, waves, requests"].speed(given)
        assert found["shipped"].speed(given) > found["first call"].speed(given)
    assert found["vLLM, waves"].speed(GIVEN) >= found["vLLM"].speed(GIVEN) * 0.99
    assert found["tuned"].speed(GIVEN) >= found["shipped"].speed(GIVEN) * 0.99
    assert found["all parts"].speed(GIVEN) > found["tuned"].speed(GIVEN)


@pytest.mark.parametrize("width", [1, 2, 8, 20])
@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job.model.name}-{job.prompts}")
def test_l2_is_never_slower(job, width):
    def seconds(rival, given):
        return rivals.vllm_seconds(
            H100, rivals.vllm(job, job.prompts, Shape(width, width), 200.0, rival), job.prompts * width, given, rival
        )

    plain, l2 = rivals.RIVALS[1:3]
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
        return sum(k.calls * k.vector_flops for k in head) / (2 * job.model.hidden)

    assert rows(None) == rows(4) == 256
    assert rows(1) == pytest.approx(64 * (1 + 0.75 + 0.75**2 + 0.75**3))
    assert rows(2) == pytest.approx(128 + 64 * 0.75**2 * 2)
    assert rows(3) == pytest.approx(192 + 64 * 0.75**3)
    whole, two = (costs.ours(job, 64, 4, 200.0, wave=w) for w in (4, 2))
    assert {k.phase for k in two} == {"last token", "segment", "RM", "RM, wave 2"}

    def bytes_of(found):
        return sum(k.bytes * k.calls for k in found if "kv_commit" in k.name or k.phase == "segment")

    assert bytes_of(whole) == pytest.approx(bytes_of(two))


def test_a_later_wave_of_one_prompt_may_not_happen():
    (first, second) = waves(JOBS[2], 1, Shape(4, 2))
    assert (first.happens, second.happens) == (1, pytest.approx(0.75**2))
    assert (second.prompts, second.rows) == (pytest.approx(1), pytest.approx(2))
    whole, two = (costs.ours(JOBS[2], 1, 4, 200.0, wave=w) for w in (4, 2))
    more = sum(k.calls * k.launches for k in two) - sum(k.calls * k.launches for k in whole)
    forward = 24 * (counted.MERGED_LINEARS + BUILT.elementwise() + 1) + counted.FORWARD
    assert more == pytest.approx(counted.WAVES + 0.75**2 * (counted.WAVE + forward + 1), abs=24)  # 24 merges, or none


def test_launches_of_a_round_by_hand():
    """Of counted parts: what the GPU runs for Qwen2, 24 layers, and what the host issues with a graph."""
    found = costs.ours(JOBS[2], 1, 4, 200.0)
    assert merges(JOBS[2].model, JOBS[2].gpu) and not merges(JOBS[0].model, JOBS[0].gpu)
    step = 24 * (counted.MERGED_LINEARS + BUILT.elementwise() + 1) + counted.FORWARD
    last = step + 1 + 1 + counted.LAST_TOKEN  # the LM head, kv_commit
    segment = 15 * 4 + 14 * (step + 1 + counted.STEP) + counted.SEGMENT  # draws; the LM head
    judged = step + 1 + counted.SCORE + counted.ROUND + 2  # reward_head; kv_commit of both models
    assert costs.launches(found) == last + segment + judged
    eager = counted.LAST_TOKEN + 1 + 4 + counted.SEGMENT + counted.SCORE + counted.ROUND + 2  # 4: the first draw
    assert costs.launches(found, graph=True) == eager + 1 + 14 + 1  # replays: a last token, steps, a pass


def test_later_calls_find_the_graphs_of_the_first():
    job = JOBS[1]
    first, later = (variants.one_call(job, kept) for kept in (False, True))
    assert first.counts["capturing"] > 0 and first.counts["eager"] == 0
    assert later.counts == {"rounds": first.counts["rounds"], "eager": 0, "capturing": 0}
    (run, issued), (run_later, issued_later) = first.launched, later.launched
    assert run == run_later > issued == issued_later


def test_the_best_width_is_the_cheapest():
    job = JOBS[0]
    assert best_shape(job, lambda prompts, shape: 1.0, waves=False)(64) == Shape(max(job.widths), max(job.widths))
    assert best_shape(job, lambda prompts, shape: shape.width**2)(64) == Shape(1, 1)
    assert best_shape(job, lambda prompts, shape: 10 + shape.wave)(64).wave == 1
    assert math.isclose(job.decided(20), 1)


# Parts


def test_a_layer_with_all_parts_is_four_launches_beside_products_and_attention():
    """Of elements read and written in bf16: two norms, a residual's sum in one of them, RoPE, SiLU and product."""
    m = TINY
    assert WHOLE.elementwise() == 4
    rotated = m.query_size + m.kv_size
    assert WHOLE.bytes(m) == 2 * (2 * m.hidden + 4 * m.hidden + 3 * m.hidden + 2 * rotated + 2 * m.kv_size
                                  + 3 * m.intermediate)  # fmt: skip
    assert BUILT.elementwise() == sum(counted.LAYER.values())


@pytest.mark.parametrize("name", parts.MISSING)
def test_each_part_saves_something_until_it_is_built(name, monkeypatch):
    def cost(engine, **how):
        return costs.round_seconds(H100, costs.ours(JOBS[2], 1, 4, 200.0, engine=engine, **how), True, GIVEN)

    with_it = Engine(frozenset({name}))
    assert cost(with_it) < cost(BUILT)
    monkeypatch.setitem(PARTS, name, PARTS[name]._replace(built=True))
    assert with_it.elementwise() == BUILT.elementwise()


def test_a_round_that_the_device_judges_hides_the_host():
    """In one wave alone; and the host issues its launches ahead, through all phases."""
    device = Engine(frozenset({"device"}))
    one, two = (costs.ours(JOBS[1], 64, 4, 200.0, engine=device, wave=wave) for wave in (4, 2))
    assert all(k.ahead for k in one) and not any(k.ahead for k in two)
    work = sum(k.seconds(H100, GIVEN) for k in one) + GIVEN.gap_seconds * costs.launches(one)
    assert costs.round_seconds(H100, one, True, GIVEN) == pytest.approx(work)
    assert costs.round_seconds(H100, one, True, replace(GIVEN, host_seconds=1.0)) == 1.0
    assert costs.round_seconds(H100, two, True, replace(GIVEN, host_seconds=1.0)) > 1.0
