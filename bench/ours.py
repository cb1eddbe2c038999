"""stars_kernels' engine on token ids, with a judge in place of the rewards and a count of its forwards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.common import Result
from bench.machine import Forward
from demo.naive import Judge
from stars_kernels import StarsConfig
from stars_kernels.decoder.answer import Answer
from stars_kernels.decoder.protocols import Commit, Rows, Scorer, Scores, Settle
from stars_kernels.decoder.scheduler import Run
from stars_kernels.hf.proposing.graphs import CudaCapture, SegmentGraphs
from stars_kernels.hf.proposing.proposer import ModelProposer
from stars_kernels.hf.scoring.classifier import ClassifierScorer
from stars_kernels.hf.sizing import round_cost
from stars_kernels.hf.view.copying import view_of
from stars_kernels.hf.view.rewrites import pack


class _Judged:
    """A Scorer whose rewards are computed in full and then replaced by the judges'."""

    def __init__(self, scorer: Scorer, judges: Sequence[Judge], segment_size: int) -> None:
        self.scorer, self.judges, self.segment_size = scorer, judges, segment_size

    def begin(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, segment_size: int) -> Scores:
        return self.scorer.begin(prompts, max_new_tokens, segment_size)

    def score(self, rows: Rows, tokens: Tensor, lengths: Tensor) -> Scores:
        scores = self.scorer.score(rows, tokens, lengths)
        columns = (rows.slot, rows.position // self.segment_size, rows.attempt, scores.rewards)
        judged = [self.judges[p](*given) for p, *given in zip(*(c.tolist() for c in columns), strict=True)]
        scores.rewards = torch.tensor(judged, dtype=torch.float64, device=scores.rewards.device)
        return scores

    def commit(self, commit: Commit) -> Settle:
        return self.scorer.commit(commit)

    def release(self) -> None:
        self.scorer.release()

    def close(self) -> None:
        self.scorer.close()


def segment_graphs(model: PreTrainedModel, config: StarsConfig) -> SegmentGraphs | None:
    """Make what `decode` runs segments with; None = eagerly, as in float64, whose ops are the definitions."""
    if model.device.type != "cuda" or not config.graphs or model.dtype == torch.float64:
        return None
    return SegmentGraphs(CudaCapture(model.device))


@torch.inference_mode()
def ours_decode(
    model: PreTrainedModel,
    rm: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    config: StarsConfig,
    keys: Sequence[int],
    judges: Sequence[Judge] | None = None,
    forwards: list[Forward] | None = None,
    graphs: SegmentGraphs | None = None,
) -> list[Result]:
    """Decode as `stars_kernels.decode` does once prompts and keys are known, all in one lock-step batch.

    forwards: gets an entry for each forward of either model (not for those inside of graphs). Answers do not end on a
    token.
    """
    lm_view, rm_view = view_of(model), view_of(rm)
    if forwards is not None:  # before packing, which takes the weights out of sight
        _count_forwards(lm_view, lm_view.model.layers, lm_view.lm_head, forwards)
        _count_forwards(rm_view.model, rm_view.model.layers, None, forwards)
    for body in (lm_view, rm_view.base_model):
        pack(body)  # as `decode` does by default
    scorer: Scorer = ClassifierScorer(rm_view, label=0)
    if judges is not None:
        scorer = _Judged(scorer, judges, config.segment_size)
    answers = [Answer(key, ids, config.max_new_tokens) for key, ids in zip(keys, prompts, strict=True)]
    proposer = ModelProposer(lm_view, graphs, fuse=model.device.type == "cuda")
    cost = round_cost(lm_view, [rm_view.base_model], config.segment_size, graphs is not None)
    Run.of(proposer, scorer, config, answers, cost=cost).run()
    for answer in answers:
        if answer.error is not None:
            raise answer.error
    return [Result.of(answer) for answer in answers]


def _count_forwards(module: nn.Module, body: nn.Module, head: nn.Module | None, forwards: list[Forward]) -> None:
    """Append an entry for each call of `module`; body: its layers, head: its output layer if it counts."""
    body_size = sum(p.numel() for p in body.parameters())
    head_size = 0 if head is None else sum(p.numel() for p in head.parameters())
    item = next(body.parameters()).element_size()

    began = 0.0

    def start(module: nn.Module, args: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def note(module: nn.Module, args: Any, given: dict[str, Any], output: Any) -> None:
        seconds = time.perf_counter() - began
        tokens = given["input_ids"].numel()
        read = 0 if head is None else output.logits[..., 0].numel()
        flops = 2 * (body_size * tokens + head_size * read)
        forwards.append(Forward((body_size + head_size) * item, flops, seconds))

    module.register_forward_pre_hook(start)
    module.register_forward_hook(note, with_kwargs=True)
