"""A segment needs no number on the host, as far as that can be seen on a CPU: only then can a CUDA graph hold it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stars_kernels import StarsConfig
from stars_kernels.decoder.protocols import Rows
from stars_kernels.decoder.rules import Plan
from stars_kernels.hf.proposing.proposer import ModelProposer
from stars_kernels.hf.view.copying import view_of
from tests.captured import would_wait
from tests.runs import admit
from tests.tiny import tiny_language_model


class Watch(TorchDispatchMode):
    """The names of the operators of a block, and which of them a GPU could not go on from at once."""

    def __init__(self):
        super().__init__()
        self.seen, self.waits = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        self.seen.append(name)
        if would_wait(function, args):
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=[False, True], ids=["logits", "fused"])
def proposer(request):
    proposer = ModelProposer(view_of(tiny_language_model(torch.float32)), fuse=request.param)
    with torch.inference_mode():
        admit(proposer, [[1, 2, 3], [40]], 20, 5)
    return proposer


@pytest.mark.parametrize("filters", [{"top_k": None}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}], ids=str)
@torch.inference_mode()
def test_a_segment(proposer, monkeypatch, filters):
    sampling = StarsConfig(**filters).sampling
    index = torch.arange(6)
    rows = Rows(slots=(index // 3).tolist(), slot=index // 3, attempt=index % 3, key=index + 100, position=index * 0)
    eos = torch.tensor([257])
    for name in ("tolist", "cpu", "numpy"):  # no operators, on a CPU
        monkeypatch.setattr(torch.Tensor, name, None)
    with Watch() as watch:
        tokens, *_ = proposer._segment(rows, Plan(5, 1), sampling, 0, eos)
    assert tokens.shape == (6, 5)
    fused = 4 if proposer.head is not None and filters == {"top_k": None} else 0
    assert [watch.seen.count(op) for op in ("segment_sample", "lm_head_sample")] == [5 - fused, fused]
    assert watch.seen.count("fork_attention") == 4 * 2
    assert watch.waits == 4 * ["is_nonzero"], "more than the CPU's looks whether all rows have ended"


@pytest.mark.parametrize(
    "wait", [lambda t: t.sum().item(), lambda t: t[t > 1], lambda t: torch.tensor([2]), torch.unique]
)
def test_what_waits_is_seen(wait):
    numbers = torch.arange(3)
    with Watch() as watch:
        wait(numbers)
    assert watch.waits
