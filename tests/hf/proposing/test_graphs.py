"""Segments from captured graphs: a stand-in for CUDA's capture that, as a graph does, sees nothing but fixed memory."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from threading import Event

import pytest
import torch

import stars_kernels
from stars_kernels import BestOf, Engine, StarsConfig, ops
from stars_kernels.decoder.memory import ALLOCATOR_LOCK, free_memory
from stars_kernels.decoder.protocols import Rows
from stars_kernels.hf import call
from stars_kernels.hf.proposing.graphs import CudaCapture, Graphs, bucket_of, padded, streams_of
from stars_kernels.hf.proposing.proposer import ModelProposer
from tests.captured import rerun, segments_as_graphs
from tests.sequential import sequential_decode
from tests.tiny import EOS, tiny_language_model, tiny_reward_model

EOS_IDS = (EOS, 3, 77, 130, *range(60, 70))  # more ends than one, so that some answers end early
PROMPTS = [[1, 2, 3], [40], [7, 8, 9, 10, 11, 12, 13, 200], [40], [90, 91, 92, 93, 94]]


@pytest.fixture
def graphs(monkeypatch):
    """All Graphs of a decode, which then takes the path of a GPU."""
    return segments_as_graphs(monkeypatch)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_answers_are_the_sequential_loops(lm, rm, graphs, size):
    """At every width and number of slots, also where rows end early; a replay has no number of the host's."""
    config = StarsConfig(seed=3, reward_threshold=2.0, beta=0.5, max_new_tokens=16, segment_size=size, max_attempts=6)
    expected = [sequential_decode(lm, rm, prompt, i, config, EOS_IDS) for i, prompt in enumerate(PROMPTS)]
    for width, slots, wave in ((1, 5, 1), (3, 2, 2), ("auto", 3, 4)):
        shaped = config.replace(width=width, wave=wave, batch_size=slots, eos_token_id=EOS_IDS)
        outputs = stars_kernels.decode(lm, rm, PROMPTS, request_ids=range(5), config=shaped)
        assert [(o.token_ids, [s.attempts for s in o.segments]) for o in outputs] == expected
        counts = graphs.pop().counts
        assert counts.replays > 3 and str(counts) in [output.backends["graphs"] for output in outputs]
    assert any(tokens[-1] in EOS_IDS for tokens, _ in expected)


def test_one_graph_serves_all_steps_of_all_sizes(graphs):
    """For each of 5 numbers of rows, and one that reads last tokens for each of 5 numbers of slots."""
    models = tiny_language_model(torch.float32), tiny_reward_model(torch.float32)
    settings = dict(seed=3, reward_threshold=2.0, beta=1.0, max_new_tokens=21, eos_token_id=(), width=2)
    with Engine(*models, **settings) as engine:
        engine.decode(PROMPTS, rule=BestOf(2))  # the longest segments: memory for them is memory for the others
        (made,) = graphs
        assert (made.counts.captures, made.counts.replays) == (1, 19)
        for size in (8, 3, 5, 8):
            engine.decode(PROMPTS, segment_size=size)
    assert len(made.holds) <= 10 and made.counts.replays > 100


def test_calibration_and_early_ends_too(lm, rm, graphs, monkeypatch):
    settings = dict(seed=5, max_new_tokens=12, segment_size=5, width=2, eos_token_id=[EOS, 3, 77, 130])
    outputs = stars_kernels.decode(lm, [rm, tiny_reward_model(seed=4)], PROMPTS, **settings)
    monkeypatch.undo()
    expected = stars_kernels.decode(lm, [rm, tiny_reward_model(seed=4)], PROMPTS, **settings)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]


def test_reward_passes(lm, rm, graphs, monkeypatch):
    """Of two models, in waves of 9 rows, and 6 or 3 behind them, each padded to a bucket; no attempt is accepted."""
    settings = dict(
        seed=3, reward_threshold=1e3, beta=1.0, accept="hard", max_attempts=9, width=5, wave=3, max_new_tokens=12,
        segment_size=4, eos_token_id=(), temperature=2.0,
    )  # fmt: skip
    models = lm, [rm, tiny_reward_model(seed=4)]
    with Engine(*models, **settings) as engine:
        outputs = engine.decode(PROMPTS[:3])
        for made in (graphs[0].part("rewards").part(i) for i in range(2)):
            assert {key[:3] for key in made.holds} == {(10, 0, 4), (6, 9, 4), (3, 9, 4)}
    monkeypatch.undo()
    expected = stars_kernels.decode(*models, PROMPTS[:3], **settings)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert [[s.rewards for s in o.segments] for o in outputs] == [[s.rewards for s in o.segments] for o in expected]


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


def test_a_graph_is_captured_at_the_second_call_and_reads_the_new_numbers():
    captured, given, found = [], torch.zeros(4), torch.zeros(4)

    def capture(run):
        captured.append(run)
        return rerun(run)

    def work():
        found.copy_(given * 2)
        given.add_(1)

    graphs = Graphs(capture)
    graphs.keep(given, found)
    for i in range(4):
        given.fill_(i)
        graphs.run("a", work)
        assert found.tolist() == [2 * i] * 4 and given.tolist() == [i + 1] * 4
    assert len(captured) == graphs.counts.captures == 1 and graphs.counts.replays == 3 and graphs.counts.seconds > 0
    graphs.keep(given, found)
    graphs.run("b", work)
    assert len(captured) == 1, "another key starts eagerly"
    for _ in range(2):
        graphs.keep(given, found[1:])
        graphs.run("a", work)
    assert len(captured) == 2, "graphs of moved buffers are forgotten"


def test_the_stand_in_does_what_a_graph_does():
    """It holds the host's numbers of the capture, leaves memory as it was, and keeps nothing from run to run."""
    host, numbers, found = {"step": 1}, torch.arange(3.0), torch.zeros(3)
    inside = []

    def work():
        inside.append(numbers * host["step"])
        numbers.add_(1)
        found.copy_(inside[0])

    replay = rerun(work)
    assert numbers.tolist() == [0, 1, 2] and found.tolist() == [0, 0, 0]
    host["step"] = 100
    replay()
    assert found.tolist() == [0, 1, 2] and numbers.tolist() == [1, 2, 3]
    replay()
    assert found.tolist() == [1, 2, 3], "the host's number of the capture"
    rerun(lambda: found.copy_(torch.empty(3)))()
    assert found.isnan().all(), "what it did not write itself"
    for wait in (lambda: numbers.sum().item(), lambda: numbers[numbers > 1], lambda: bool(numbers.any())):
        with pytest.raises(AssertionError, match="a capture would wait"):
            rerun(wait)


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
    work = []
    for device in ("cuda:0", "cuda:0", "cuda:1", "cuda:0"):
        capture = CudaCapture(torch.device(device))
        for value in (1.0, 2.0):
            capture(lambda value=value: work.append(value))()
    assert work == 4 * [1.0, 2.0], "its Python runs once"
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
    capture(lambda: None)()
    assert len(cuda.captures) == 2 and cuda.log[1][1] == "replays"
