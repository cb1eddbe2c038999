"""Segments from captured graphs: a stand-in for CUDA's capture that, as a graph does, sees nothing but fixed memory."""

import pytest
import torch

import stars_kernels
from stars_kernels import ops
from stars_kernels.decoder.protocols import Rows
from stars_kernels.hf import engine
from stars_kernels.hf.graphs import SegmentGraphs, bucket_of, padded
from stars_kernels.hf.proposer import ModelProposer
from tests.tiny import EOS

PROMPTS = [[1, 2, 3], [40], [7, 8, 9, 10, 11, 12, 13, 200], [40], [90, 91, 92, 93, 94]]


def rerun(run):
    """What a replay does: the same work on the same memory, its result where it was before."""
    result = run()

    def replay():
        result.copy_(run())
        return result

    return replay


@pytest.fixture
def graphs(monkeypatch):
    """All SegmentGraphs of a decode, which then takes the path of a GPU."""
    made = []

    class Recorded(SegmentGraphs):
        def __init__(self, capture):
            super().__init__(rerun)
            made.append(self)

    monkeypatch.setattr(engine, "SegmentGraphs", Recorded)
    monkeypatch.setattr(engine, "CudaCapture", lambda device: None)
    monkeypatch.setattr(engine.Engine, "_why_eager", lambda self: None)
    return made


@pytest.mark.parametrize("width", [1, 3, "auto"])
def test_answers_are_those_of_eager_segments(lm, rm, graphs, monkeypatch, width):
    settings = dict(seed=3, reward_threshold=2.0, beta=1.0, max_new_tokens=22, segment_size=4, eos_token_id=())
    outputs = stars_kernels.decode(lm, rm, PROMPTS, width=width, **settings)
    assert sum(made.replays for made in graphs) > 3
    monkeypatch.undo()
    expected = stars_kernels.decode(lm, rm, PROMPTS, width=width, **settings)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert [o.reward for o in outputs] == [o.reward for o in expected]


def test_calibration_and_early_ends_too(lm, rm, graphs, monkeypatch):
    settings = dict(seed=5, max_new_tokens=12, segment_size=5, width=2, eos_token_id=[EOS, 3, 77, 130])
    outputs = stars_kernels.decode(lm, rm, PROMPTS, **settings)
    monkeypatch.undo()
    expected = stars_kernels.decode(lm, rm, PROMPTS, **settings)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]


def rows_of(count, first=0):
    index = torch.arange(first, first + count)
    return Rows(owners=(index // 4).tolist(), prompt=index // 4, attempt=index, key=index + 100, position=index * 0 + 7)


def test_padded_rows_repeat_the_last():
    rows = padded(rows_of(5), 8)
    assert rows.prompt.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert rows.attempt.tolist() == [0, 1, 2, 3, 4, 4, 4, 4]
    assert rows.key.tolist()[4:] == [104] * 4


def test_buckets():
    sizes = [bucket_of(n) for n in range(1, 3000)]
    assert all(n <= size < n * 1.25 + 1 for n, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes) and len(set(sizes)) < 50
    assert all(bucket_of(size) == size for size in sizes)


def test_a_graph_is_captured_at_the_second_call_and_reads_the_new_rows():
    captured = []

    def capture(run):
        captured.append(run)
        return rerun(run)

    graphs = SegmentGraphs(capture)
    results = [graphs.run(lambda rows: rows.attempt[:, None] * 2, rows_of(4, i), "a", "here") for i in range(4)]
    assert [r[:, 0].tolist() for r in results] == [[2 * (i + k) for k in range(4)] for i in range(4)]
    assert len(captured) == 1 and graphs.replays == 3
    graphs.run(lambda rows: rows.attempt[:, None], rows_of(4), "b", "here")
    graphs.run(lambda rows: rows.attempt[:, None], rows_of(3), "a", "here")
    assert len(captured) == 1, "other settings and other sizes start eagerly"
    for _ in range(2):
        graphs.run(lambda rows: rows.attempt[:, None], rows_of(4), "a", "moved")
    assert len(captured) == 2, "graphs of moved buffers are forgotten"


@pytest.mark.parametrize("filters", [{"top_k": None}, {"top_k": None, "temperature": 0.6}, {"top_k": 5}])
def test_fused_draws_are_the_same_draws(lm, rm, graphs, monkeypatch, filters):
    """On a GPU the output layer and the draw are one op; here its definition."""
    calls, fused = [], {"fuse": True}
    real = ops.lm_head_sample
    monkeypatch.setattr(ops, "lm_head_sample", lambda *given, **options: calls.append(1) or real(*given, **options))
    monkeypatch.setattr(engine, "ModelProposer", lambda *given, **options: ModelProposer(*given, **options | fused))
    settings = dict(seed=3, reward_threshold=2.0, beta=1.0, max_new_tokens=22, segment_size=4, **filters)
    outputs = stars_kernels.decode(lm, rm, PROMPTS, **settings)
    assert bool(calls) == (filters["top_k"] is None)
    monkeypatch.undo()
    expected = stars_kernels.decode(lm, rm, PROMPTS, **settings)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
