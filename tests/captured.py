"""A stand-in for CUDA's graphs on a CPU: what was captured runs again, and sees nothing but fixed memory."""

from stars_kernels.hf import call, serving
from stars_kernels.hf.proposing.graphs import SegmentGraphs


def rerun(run):
    """What a replay does: the same work on the same memory, its result where it was before."""
    result = run()

    def replay():
        for place, tensor in zip(result, run(), strict=True):
            place.copy_(tensor)
        return result

    return replay


class Live(SegmentGraphs):
    """Its replays run the newest segment: a GPU's have no Python, but only what was there at the capture.

    So what a segment reads must be the same, and at the same place, whenever a key comes again.
    """

    def __init__(self, capture):
        super().__init__(capture)
        self.read = {}

    def run(self, segment, rows, settings, storage):
        self.segment, proposer, eos = segment, segment.func.__self__, segment.keywords["eos"]
        if storage != self._storage:
            self.read.clear()
        logits, cache, head = proposer.logits, proposer.cache, proposer.head
        read = (
            logits.shape,
            logits.data_ptr(),
            eos.shape,
            eos.data_ptr(),
            cache.offsets.shape,
            cache.storage,
            head is None,
        )
        assert self.read.setdefault((len(rows), settings), read) == read
        return super().run(lambda rows: self.segment(rows), rows, settings, storage)


def segments_as_graphs(monkeypatch):
    """Let decodes take the path of a GPU; returns the list of all SegmentGraphs that they make."""
    made = []

    def recorded(device):
        made.append(SegmentGraphs(rerun))
        return made[-1]

    monkeypatch.setattr(call.Workspace, "make_graphs", staticmethod(recorded))
    monkeypatch.setattr(serving.Serving, "_why_eager", lambda self: None)
    return made
