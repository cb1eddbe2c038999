"""Segments from captured graphs: a stand-in for CUDA's capture that, as a graph does, sees nothing but fixed memory."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from threading import Event

import pytest
import torch

import stars_kernels
from stars_kernels import ops
from stars_kernels.decoder.memory import ALLOCATOR_LOCK, free_memory
from stars_kernels.decoder.protocols import Rows
from stars_kernels.hf import call
from stars_kernels.hf.proposing.graphs import CudaCapture, SegmentGraphs, bucket_of, padded, streams_of
from stars_kernels.hf.proposing.proposer import ModelProposer
from tests.captured import rerun, segments_as_graphs
from tests.tiny import EOS

PROMPTS = [[1, 2, 3], [40], [7, 8, 9, 10, 11, 12, 13, 200], [40], [90, 91, 92, 93, 94]]


@pytest.fixture
def graphs(monkeypatch):
    """All SegmentGraphs of a decode, which then takes the path of a GPU."""
    return segments_as_graphs(monkeypatch)


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
    return Rows(slots=(index // 4).tolist(), slot=index // 4, attempt=index, key=index + 100, position=index * 0 + 7)


def test_padded_rows_repeat_the_last():
    rows = padded(rows_of(5), 8)
    assert rows.slot.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
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
    results = [graphs.run(lambda rows: (rows.attempt[:, None] * 2,), rows_of(4, i), "a", "here") for i in range(4)]
    assert [r[:, 0].tolist() for (r,) in results] == [[2 * (i + k) for k in range(4)] for i in range(4)]
    assert len(captured) == 1 and graphs.replays == 3
    graphs.run(lambda rows: (rows.attempt[:, None],), rows_of(4), "b", "here")
    graphs.run(lambda rows: (rows.attempt[:, None],), rows_of(3), "a", "here")
    assert len(captured) == 1, "other settings and other sizes start eagerly"
    for _ in range(2):
        graphs.run(lambda rows: (rows.attempt[:, None],), rows_of(4), "a", "moved")
    assert len(captured) == 2, "graphs of moved buffers are forgotten"


@pytest.mark.parametrize("filters", [{"top_k": None}, {"top_k": None, "temperature": 0.6}, {"top_k": 5}])
def test_fused_draws_are_the_same_draws(lm, rm, graphs, monkeypatch, filters):
    """On a GPU the output layer and the draw are one op; here its definition."""
    calls, fused = [], {"fuse": True}
    real = ops.lm_head_sample
    monkeypatch.setattr(ops, "lm_head_sample", lambda *given, **options: calls.append(1) or real(*given, **options))
    monkeypatch.setattr(call, "ModelProposer", lambda *given, **options: ModelProposer(*given, **options | fused))
    settings = dict(seed=3, reward_threshold=2.0, beta=1.0, max_new_tokens=22, segment_size=4, **filters)
    outputs = stars_kernels.decode(lm, rm, PROMPTS, **settings)
    assert bool(calls) == (filters["top_k"] is None)
    monkeypatch.undo()
    expected = stars_kernels.decode(lm, rm, PROMPTS, **settings)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]


class FakeCuda:
    """A stand-in for torch.cuda: what is made, and what is enqueued where, in order."""

    def __init__(self):
        self.streams, self.pools, self.captures, self.log = [], [], [], []
        torch_cuda = self

        class Stream:
            def __init__(self, device):
                self.device = device
                torch_cuda.streams.append(self)

            def wait_stream(self, other):
                torch_cuda.log.append((self, "waits for", other))

        class CallersStream(Stream):
            def __init__(self):
                self.device = None

        class CUDAGraph:
            def replay(self):
                torch_cuda.log.append((torch_cuda.current, "replays", self))

        self.Stream, self.CUDAGraph = Stream, CUDAGraph
        self.current = self.caller = CallersStream()

    def graph_pool_handle(self):
        self.pools.append(object())
        return self.pools[-1]

    def device(self, device):
        return nullcontext()

    def current_stream(self, device):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert ALLOCATOR_LOCK.locked()
        self.captures.append((graph, pool, stream))
        yield


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    for name in ("Stream", "CUDAGraph", "graph_pool_handle", "device", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    streams_of.cache_clear()
    yield fake
    streams_of.cache_clear()


def test_batches_share_streams_but_no_pool(cuda):
    for device in ("cuda:0", "cuda:0", "cuda:1", "cuda:0"):
        capture = CudaCapture(torch.device(device))
        for value in (1.0, 2.0):
            assert capture(lambda value=value: torch.tensor(value))() == value
    assert len(cuda.streams) == 4 and len(cuda.pools) == 4
    assert len(cuda.captures) == 8
    for i, device in enumerate((0, 0, 0, 0, 1, 1, 0, 0)):
        graph, pool, stream = cuda.captures[i]
        assert stream is cuda.streams[2 * device]
        assert pool is cuda.pools[i // 2]
        # on the device's own stream, behind what the caller enqueued and before what he enqueues next
        replays = cuda.streams[2 * device + 1]
        assert cuda.log[3 * i : 3 * i + 3] == [
            (replays, "waits for", cuda.caller), (replays, "replays", graph), (cuda.caller, "waits for", replays)
        ]  # fmt: skip


def test_clean_up_waits_for_a_capture(cuda, monkeypatch):
    """And a capture for a clean-up."""
    happened, inside, cleaning, go_on = [], Event(), Event(), Event()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: cleaning.set() or True)

    def empty():
        happened.append("clean-up begins")
        inside.set()
        assert go_on.wait(60)
        happened.append("clean-up ends")

    def run():
        happened.append("capture begins")
        inside.set()
        assert go_on.wait(60)
        happened.append("capture ends")
        return torch.zeros(())

    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    capture = CudaCapture(torch.device("cuda:0"))
    for first, second in [(lambda: capture(run), free_memory), (free_memory, lambda: capture(run))]:
        for event in (inside, cleaning, go_on):
            event.clear()
        happened.clear()
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(first)]
            assert inside.wait(60)
            jobs.append(pool.submit(second))
            assert cleaning.wait(60)
            time.sleep(0.05)  # for what would not wait
            begun = list(happened)
            go_on.set()
            for job in jobs:
                job.result(timeout=60)
        assert len(begun) == 1 and len(happened) == 4
        assert [word.split()[0] for word in happened] in (
            ["capture", "capture", "clean-up", "clean-up"], ["clean-up", "clean-up", "capture", "capture"]
        )  # fmt: skip


def test_a_capture_that_fails_lets_the_next_begin(cuda):
    def fail():
        raise ValueError("no")

    capture = CudaCapture(torch.device("cuda:0"))
    with pytest.raises(ValueError, match="no"):
        capture(fail)
    assert not ALLOCATOR_LOCK.locked()
    assert capture(lambda: torch.tensor(3.0))() == 3
