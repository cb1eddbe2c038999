"""A stand-in for CUDA's graphs on a CPU: operators are recorded with what they were given, and run again on that."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stars_kernels.hf import call, serving
from stars_kernels.hf.proposing.graphs import Graphs

READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive"}
"""On a GPU their results wait for it: a number for the host, or a shape."""
COPIES = {"lift_fresh"}
"""What torch.tensor(...) does: a copy from the host."""

TAKES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""What only takes memory."""


def would_wait(function, args):
    """Whether a GPU could not go on from this operator at once."""
    name = function._schema.name.partition("::")[2]
    indices = args[1] if name in ("index", "index_put", "index_put_") else ()
    return name in READS | COPIES or any(i is not None and i.dtype == torch.bool for i in indices)


def memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Records a block's operators. As a capture does, it leaves what was there before as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.made: dict[int, torch.Tensor] = {}
        """The newest tensor of each piece of memory that came to be in the block: nothing else may be read there."""
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name.partition("::")[2]
        if would_wait(function, args):
            raise AssertionError(f"a capture would wait for {name}")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if function._schema.is_mutable:
            for tensor in given:
                if memory(tensor) not in self.made and memory(tensor) not in self._before:
                    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                    self._before[memory(tensor)] = whole, whole.clone()
        result = function(*args, **kwargs)
        known = {memory(tensor) for tensor in given}
        new = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and memory(leaf) not in known]
        self.made |= {memory(tensor): tensor for tensor in new}
        if name not in TAKES:
            self.calls.append((function, args, kwargs, new))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        for whole, before in self._before.values():
            whole.copy_(before)
        self._before.clear()

    def replay(self) -> None:
        """Run the operators again, each on the tensors and the numbers of the capture.

        What they make has anything in it before: a graph's memory is another's as soon as it has run.
        """
        for tensor in self.made.values():
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            whole.fill_(0xFF)  # NaN, -1
        for function, args, kwargs, new in self.calls:
            known = {memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            result = function(*args, **kwargs)
            fresh = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            fresh = [leaf for leaf in fresh if memory(leaf) not in known]
            for place, tensor in zip(new, fresh, strict=True):
                place.copy_(tensor)


def rerun(run):
    """What a capture does: run() once, for nothing but to see what it does; returns what does it again."""
    tape = Tape()
    with tape:
        run()
    assert tape.calls, "an empty graph"
    return tape.replay


def segments_as_graphs(monkeypatch):
    """Let decodes take the path of a GPU; returns the list of all Graphs that they make."""
    made = []

    def recorded(device):
        made.append(Graphs(rerun))
        return made[-1]

    monkeypatch.setattr(call.Workspace, "make_graphs", staticmethod(recorded))
    monkeypatch.setattr(serving.Serving, "_why_eager", lambda self: None)
    return made
