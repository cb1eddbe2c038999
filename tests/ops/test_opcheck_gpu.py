"""torch.library.opcheck of the ops that have a GPU version, on the GPU's tensors: schema, fake and dispatch agree."""

import pytest
import torch

from stars_kernels.ops import backends
from stars_kernels.ops.philox import STREAM_SAMPLE
from tests.ops import test_accept, test_fork_attention, test_kv_commit, test_lm_head_sample, test_reward_head
from tests.ops.helpers import dtype_name, generator, longs, moved
from tests.ops.test_segment_sample import rows_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"),
]
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)


def opcheck(op, case):
    """case: the op's arguments by name."""
    call = getattr(torch.ops.stars, op).default
    assert backends()[op]["cuda"] in (("cuda", "triton") if op == "accept" else ("triton",))
    given = moved(case, "cuda")
    torch.library.opcheck(call, tuple(given[argument.name] for argument in call._schema.arguments))


@pytest.mark.parametrize("steps", [1, 3])
@dtypes
def test_attention(dtype, steps):
    options = {"window": 0, "softcap": 0.0, "sinks": None}
    opcheck("fork_attention", options | test_fork_attention.make_case(steps=steps, dtype=dtype, shape=(4, 2, 8, 6)))


@dtypes
def test_head(dtype):
    opcheck("reward_head", test_reward_head.make_case(dtype))


@dtypes
def test_commit(dtype):
    case = test_kv_commit.make_case(dtype)
    for name in ("suffix", "arena"):  # opcheck compares values, and NaN is not equal to itself
        case[name] = case[name].nan_to_num(posinf=0, neginf=0)
    opcheck("kv_commit", case)


@dtypes
def test_output(dtype):
    opcheck(
        "lm_head_sample", test_lm_head_sample.make_case(dtype=dtype) | {"temperature": 0.8, "stream": STREAM_SAMPLE}
    )


@pytest.mark.parametrize("filters", [(1.0, 0, 1.0, 0.0), (0.7, 3, 0.9, 0.1)], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@dtypes
def test_segment_sample(dtype, shared, filters):
    names = ("keys", "attempt", "position", "source", "temperature", "top_k", "top_p", "min_p", "stream")
    source = longs(0, 0, 0, 0) if shared else None
    values = (*rows_of(4), source, *filters, STREAM_SAMPLE)
    logits = torch.randn(1 if shared else 4, 10, generator=generator(10)).to(dtype)
    opcheck("segment_sample", {"logits": logits, **dict(zip(names, values, strict=True))})


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize(("prompts", "width"), [(6, 3), (0, 2), (2, 0)])
def test_judge(prompts, width, hard):
    case = test_accept.make_case(prompts, width, hard=hard)
    case["best_reward"] = torch.zeros(prompts, dtype=torch.float64)  # opcheck compares values: no NaN
    opcheck("accept", case)
