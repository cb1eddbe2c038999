"""What a round of the engine launches on a GPU, counted on a CPU: a small model in bf16 takes the GPU's path.

    python -m bench.launches

Each op that the engine calls is looked up in `OPS`: how many launches it takes on a GPU. One that is not there is an
error, never a guess. Models of one and of two layers tell a layer's launches from those around the layers.

Graphs are stood in for: what would be captured is called again, so a step's launches are those of a graph's nodes.

Not seen here: what a GPU's host does beside launches (pinned memory, the copy of each wave's results to the host, the
copies between the streams of a replay); second kernels of a product (split-K); the launches of a stars op, which its
launcher decides by the shapes (bench/kernels.py has them, tests/test_roofline.py counts them in Triton's interpreter).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from bench.tables import table
from stars_kernels.decoder import round as round_
from stars_kernels.decoder.config import StarsConfig
from stars_kernels.hf.call import Call, Workspace
from stars_kernels.hf.models import Models
from stars_kernels.hf.proposing.graphs import Graphs
from stars_kernels.hf.view.layout import layout_of
from stars_kernels.hf.view.rewrites import merged as merging
from stars_kernels.hf.view.rewrites import mlp
from stars_kernels.ops.philox import STREAM_SAMPLE

FREE = ("_unsafe_view", "empty", "new_empty", "split_with_sizes", "unbind")
"""Ops that move nothing, beside those that the dispatcher knows as views."""
LINEAR_OPS = ("addmm", "mm")
"""A linear layer, its bias included: one product of cuBLAS."""
ONE = (
    "_to_copy", "add", "any", "arange", "argmax", "bitwise_and", "bitwise_not", "bitwise_or", "cat", "clamp", "clone",
    "copy", "cos", "cumsum", "div", "embedding", "eq", "fill", "stack", "full_like", "gather", "ge", "index",
    "index_add", "index_put_", "index_select", "lt", "masked_fill", "mean", "minimum", "mul", "ne", "neg", "ones_like",
    "pow", "rsqrt", "rsub", "scalar_tensor", "silu", "sin", "sub", "where", "zero", "zeros", "zeros_like",
)  # fmt: skip
SEVERAL = {"index_put": 2}
"""A copy first."""
OPS = dict.fromkeys(FREE, 0) | dict.fromkeys((*LINEAR_OPS, *ONE), 1) | SEVERAL
"""Launches on a GPU of each ATen op, by its name; one that works in place is as the other, where not told apart."""
SHAPED = ("fork_attention", "kv_commit", "lm_head_sample", "reward_head", "segment_sample")
"""Ops of this package whose launches follow from their shapes, and are not in the constants: counted as calls."""
STARS_OPS = (*SHAPED, "accept", "add_rms_norm", "gated", "rms_norm", "rotary_store")
"""The others are one launch."""

FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification),
}
EOS = 0
HOST = "host"
"""The part that a GPU's host computes by itself."""


class Launches(TorchDispatchMode):
    """Within it, launches are counted in `seen`, by part and op; `part` is where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, str]] = Counter()
        self.part = ""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        space, name = function._schema.name.split("::")
        if self.part == HOST:
            return out
        if name == "lift_fresh":
            self.seen[self.part, "upload"] += 1
        if isinstance(out, Tensor) and (function.is_view or out.is_meta):  # on "meta" a model's layout is found
            return out
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise ValueError("index by a mask, expected numbers: a GPU's host would wait for how many there are")
        if launches := self.launches(space, name):
            self.seen[self.part, name if name in OPS else name.rstrip("_")] += launches
        return out

    @staticmethod
    def launches(space: str, name: str) -> int:
        if space == "stars" and name in STARS_OPS:
            return 1
        found = OPS.get(name, OPS.get(name.rstrip("_"))) if space == "aten" else None
        if found is None:
            raise ValueError(f"{space}::{name} is launched, expected an op of bench/launches.py's OPS")
        return found

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def counted(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        """Return a function whose launches count as this part's; "+" before it adds to the part around it."""

        def within(*args: Any, **kwargs: Any) -> Any:
            with self.inside(self.part + part if part.startswith("+") else part):
                return call(*args, **kwargs)

        return within


def models_of(family: str, layers: int, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Make a language model and a reward model of so many layers."""
    config, model, classifier = FAMILIES[family]
    sizes = config(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, num_labels=1, bos_token_id=1, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    lm, rm = model(sizes), classifier(sizes)
    with torch.no_grad():
        lm.lm_head.weight[EOS] = 0.0  # which is not among the likeliest then
        rm.score.weight.zero_()  # all attempts are as good: the first one stays the best
    return lm.to(dtype).eval(), rm.to(dtype).eval()


def models_on_a_gpu(lm: PreTrainedModel, rm: PreTrainedModel, merged: bool) -> Models:
    """Load models as they are on a GPU, fused and not packed; merged: one that has memory for merged weights."""
    with (
        mock.patch.object(mlp, "fuses", lambda weight: True),
        mock.patch.object(merging, "memory_of", lambda device: 2**40 if merged else 0),
        mock.patch("stars_kernels.hf.models.pack", lambda body, dtype: 0),
    ):
        return Models(lm, rm, None, False, pack_as=True)


@cache
def seen(
    family: str, layers: int, *, dtype: torch.dtype = torch.bfloat16, segment: int = 5, prompts: int = 2,
    width: int = 2, wave: int | None = None, accepted: bool = True, merged: bool = False,
) -> Counter[tuple[str, str]]:  # fmt: skip
    """Count a call's prefill, and one round of it; by part and op.

    Parts end in "+forward" where a model is in its forward, the output layer included. The third round is counted: it
    reads the last tokens that the second one decided, and finds the graph that the second one captured.

    accepted: whether each round accepts every prompt's first attempt, or none. merged: whether the GPU has memory for
    copies of weights whose products are one.
    """
    torch.manual_seed(0)
    config = StarsConfig(
        segment_size=segment, max_new_tokens=4 * segment, width=width, wave=wave or width, batch_size=prompts,
        accept="hard", reward_threshold=-1e6 if accepted else 1e6, beta=1.0, top_k=4, seed=0, eos_token_id=(EOS,),
    )  # fmt: skip
    call = Call(models_on_a_gpu(*models_of(family, layers, dtype), merged), config)
    call.serving.eager = None
    call.workspace = Workspace(torch.device("cpu"), 0)
    call.workspace.graphs = Graphs(lambda run: run)
    requests = call.admit_all([[2 + p, 5, 7] for p in range(prompts)], None)
    launches = Launches()
    with torch.no_grad():  # in inference mode ops of several would not be taken apart before they are seen
        run = call.new_run(requests, config.resolved_rule, width, STREAM_SAMPLE)
        proposer: Any = run.round.proposer
        scorer: Any = run.round.scorer
        layout_of(scorer.backbone)  # found by a forward, once for an engine
        for owner, method, part in (
            (proposer, "admit", "prefill"), (proposer, "read_last", "last token"),
            (proposer, "_segment_of_graphs", "segment"), (scorer, "admit", "prefill RM"),
            (scorer, "score", "RM"), (proposer, "_logits", "+forward"), (scorer, "_hidden", "+forward"),
        ):  # fmt: skip
            setattr(owner, method, launches.counted(getattr(owner, method), part))
        with launches.inside("prefill round"), launches:
            run.step()
        run.step()
        run.step()
        uniforms = launches.counted(round_.accept_uniforms, HOST)
        with launches.inside("round"), mock.patch.object(round_, "accept_uniforms", uniforms), launches:
            run.step()
        run.close()
    for answer in run.answers:
        if answer.error is not None:
            raise answer.error
    return launches.seen


def counted(family: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Return the constants of bench/counted.py, by name, as they are."""
    one, two = (parts(seen(family, layers, dtype=dtype)) for layers in (1, 2))
    longer, waves = parts(seen(family, 1, dtype=dtype, segment=6)), parts(seen(family, 1, dtype=dtype, wave=1))
    few, more = (parts(seen(family, 1, dtype=dtype, width=w, wave=1, accepted=False)) for w in (2, 3))

    def layer(part: str) -> Counter[str]:
        return two[part] - one[part]

    def linears(ops: Counter[str]) -> int:
        return sum(ops[name] for name in LINEAR_OPS)

    def others(ops: Counter[str]) -> int:
        """Beside linears and those of `SHAPED`."""
        return ops.total() - sum(ops[name] for name in (*LINEAR_OPS, *SHAPED))

    step = longer["segment"] - one["segment"]
    steps = others(one["segment"]) // others(step)
    forward = others(one["RM+forward"]) - others(layer("RM+forward"))
    prompts = others(one["prefill+forward"]) - others(layer("prefill+forward")) - forward
    both = [parts(seen(family, layers, dtype=dtype, merged=True))["RM+forward"] for layers in (1, 2)]
    return {
        "LINEARS": linears(layer("RM+forward")),
        "MERGED_LINEARS": linears(both[1] - both[0]),
        "LAYER": {op: n for op, n in sorted(layer("RM+forward").items()) if op not in (*LINEAR_OPS, *SHAPED)},
        "PREFILL_ELEMENTWISE": others(layer("prefill+forward")),
        "FORWARD": forward,
        "STEP": others(step),
        "SEGMENT": others(one["segment"]) - steps * others(step),
        "LAST_TOKEN": others(one["last token"]),
        "SCORE": others(one["RM"]),
        "WAVES": sum(others(waves[part]) - others(one[part]) for part in ("RM", "round")),
        "WAVE": sum(others(more[part]) - others(few[part]) for part in ("RM", "round")),
        "PREFILL": prompts + others(one["prefill"]),
        "PREFILL_REWARD": others(one["prefill RM"]),
        "ROUND": others(one["round"]),
        "ON_DEVICE": any(ops["accept"] for ops in one.values()),
    }


def parts(launches: Counter[tuple[str, str]]) -> dict[str, Counter[str]]:
    """Return what each part launched, by op."""
    found: dict[str, Counter[str]] = {}
    for (part, op), count in launches.items():
        found.setdefault(part, Counter())[op] += count
    return found


if __name__ == "__main__":
    here = {family: counted(family) for family in FAMILIES}
    print(table([{"launches": n, **{f: found[n] for f, found in here.items()}} for n in next(iter(here.values()))]))
