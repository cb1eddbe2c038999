"""On a GPU the host waits once a wave, as far as that can be seen on a CPU: for the numbers that are judged."""

import pytest
import torch

from stars_kernels.decoder import ends, round, transfer
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.hf.cache import fork as cache
from stars_kernels.hf.cache.hidden import HiddenStates
from stars_kernels.hf.proposing import proposer
from stars_kernels.hf.proposing.graphs import Graphs
from stars_kernels.hf.proposing.proposer import ModelProposer
from stars_kernels.hf.scoring.classifier import ClassifierScorer
from stars_kernels.hf.scoring.own_head import OwnHeadScorer
from stars_kernels.hf.scoring.total import SumScorer
from stars_kernels.hf.view.copying import view_of
from tests.hf.loops import loop_of, stop_at
from tests.hf.proposing.test_segment_waits import Watch
from tests.tiny import tiny_language_model, tiny_reward_model

PROMPTS = [[1, 2, 3], [40], list(range(50, 61))]
SIZE = 4
CONFIG = StarsConfig(
    segment_size=SIZE, max_new_tokens=12, max_attempts=5, width=2, wave=2, reward_threshold=1.5, beta=0.5, seed=0
)


def batch(rewards, graphs=False, wave=2, **answers):
    """A batch, its scorer a classifier, a head on the model's own states, or the sum of both."""
    view = view_of(tiny_language_model())
    hidden = HiddenStates(view) if rewards != "classifier" else None
    parts = []
    if rewards != "own head":
        parts.append(ClassifierScorer(view_of(tiny_reward_model()), 0))
    if hidden is not None:
        torch.manual_seed(2)
        parts.append(OwnHeadScorer(torch.nn.Linear(24, 1).double(), hidden))
    scorer = parts[0] if len(parts) == 1 else SumScorer([(part, 0.5) for part in parts])
    replayed = Graphs(lambda run: run) if graphs else None
    return loop_of(
        ModelProposer(view, replayed, hidden=hidden), scorer, CONFIG.replace(wave=wave), PROMPTS, range(3), **answers
    )


@pytest.fixture
def waits(monkeypatch):
    """The waits of each round of a loop; a read of many numbers at once is one, an upload is none."""
    watch = Watch()

    def unseen(function, name):
        def call(*args):
            before = list(watch.waits)
            result = function(*args)
            watch.waits = before + ([name] if name else [])
            return result

        return call

    monkeypatch.setattr(round, "accept_uniforms", unseen(round.accept_uniforms, None))  # the host's own
    for module in (ends, round, proposer):
        monkeypatch.setattr(module, "to_device", unseen(transfer.to_device, None))
    for module in (ends, round, cache):
        monkeypatch.setattr(module, "to_host", unseen(transfer.to_host, "to_host"))

    def seen(name, real):
        def call(tensor):
            watch.waits.append(name)
            return real(tensor)

        return call

    for name in ("tolist", "cpu", "numpy"):  # no operators, on a CPU
        monkeypatch.setattr(torch.Tensor, name, seen(name, getattr(torch.Tensor, name)))

    def of(loop):
        loop.admit()
        rounds = loop.rounds()
        found, watch.waits = [], []
        with watch:
            for _ in rounds:
                found.append(watch.waits)
                watch.waits = []
        return found

    return of


@pytest.mark.parametrize("rewards", ["classifier", "own head", "sum"])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@torch.inference_mode()
def test_one_wait_a_round(waits, rewards, graphs):
    batch_ = batch(rewards, graphs)
    found = waits(batch_)
    assert [answer.error for answer in batch_.answers] == [None] * 3
    outcomes = {s.outcome for answer in batch_.answers for s in answer.segments}
    assert "accepted" in outcomes and len(found) > 3
    looks = (0 if graphs else SIZE - 1) * ["is_nonzero"]  # the CPU's, in an eager segment: whether all rows have ended
    assert found == [[*looks, "to_host"]] * len(found)


@torch.inference_mode()
def test_one_wait_a_wave(waits):
    found = waits(batch("classifier", wave=1))
    counts = [sum(wait == "to_host" for wait in round_) for round_ in found]
    assert set(counts) == {1, 2}


@torch.inference_mode()
def test_stop_strings_wait_for_the_candidates_too(waits):
    found = waits(batch("classifier", find_stop=stop_at({7})))
    assert {tuple(wait for wait in round_ if wait != "is_nonzero") for round_ in found} == {("to_host", "to_host")}


def test_reads_and_uploads_keep_every_bit():
    floats = torch.tensor([[0.1, -0.0], [float("nan"), float("-inf")]], dtype=torch.float64)
    ints, bools = torch.tensor([2**63 - 1, -(2**63), 2**53 + 1]), torch.tensor([[True], [False]])
    read = transfer.to_host([floats, ints, bools, floats[:, 1], ints[:0]])
    assert torch.tensor(read[0], dtype=torch.float64).view(torch.int64).equal(floats.view(torch.int64))
    assert read[1:3] == [ints.tolist(), [[True], [False]]]
    assert read[3] == [0.0, float("-inf")] and read[4] == []
    first, empty, last = transfer.to_device([ints.tolist(), [], [1]], torch.device("cpu"))
    assert first.equal(ints) and empty.shape == (0,) and last.tolist() == [1]
    (column,) = transfer.to_device([[1, 0.1, float("-inf")]], torch.device("cpu"), torch.float64)
    assert column.dtype == torch.float64 and column.tolist() == [1.0, 0.1, float("-inf")]
    with pytest.raises(TypeError, match=r"a tensor of torch\.float32, expected float64, int64 or bool"):
        transfer.to_host([torch.ones(2)])
