"""That a CUDA tensor would reach the Triton launchers: each op's CUDA key, called by hand."""

import inspect

import pytest
import torch

from stars_kernels.ops import backends
from stars_kernels.ops.triton import LAUNCHERS
from tests.ops import (
    test_accept,
    test_add_rms_norm,
    test_fork_attention,
    test_gated,
    test_kv_commit,
    test_lm_head_sample,
    test_reward_head,
    test_rms_norm,
    test_rotary_store,
)
from tests.ops.helpers import longs, moved

CASES = {
    "accept": test_accept.make_case(5, 3),
    "add_rms_norm": dict(
        zip(("x", "residual", "weight", "eps"), (*test_add_rms_norm.make_case(), test_rms_norm.EPS), strict=True)
    ),
    "gated": dict(zip(("gate", "up", "activation"), (*test_gated.make_case(), "silu"), strict=True)),
    "fork_attention": test_fork_attention.make_case(dtype=torch.float32, window=0, softcap=0.0, sinks=None),
    "kv_commit": test_kv_commit.make_case(),
    "lm_head_sample": test_lm_head_sample.make_case() | {"temperature": 1.0, "stream": 0},
    "reward_head": test_reward_head.make_case(torch.float32),
    "rms_norm": dict(zip(("x", "weight", "eps"), (*test_rms_norm.make_case(), test_rms_norm.EPS), strict=True)),
    "rotary_store": test_rotary_store.make_case(),
    "segment_sample": {
        "logits": torch.randn(2, 50), "keys": longs(1, 2), "attempt": longs(0, 1), "position": longs(3, 4),
        "source": None, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "stream": 0,
    },
}  # fmt: skip
KERNELS = {
    "accept": {"_accept"},
    "add_rms_norm": {"_add_rms_norm"},
    "fork_attention": {"_fork_attention"},
    "gated": {"_gated"},
    "kv_commit": {"_commit"},
    "lm_head_sample": {"_lm_head_race", "_lm_head_finish"},
    "reward_head": {"_reward_head"},
    "rms_norm": {"_rms_norm"},
    "rotary_store": {"_rotary_store"},
    "segment_sample": {"_race", "_finish"},
}


def of_the_extension(op):
    """Skip where the op's key is the extension's."""
    served = backends()[op]["cuda"]
    return pytest.param(op, marks=pytest.mark.skipif(served == "cuda", reason=f"{op} is the extension's on a GPU"))


@pytest.mark.parametrize("op", map(of_the_extension, LAUNCHERS))
def test_the_cuda_key_holds_the_launcher(op, device, launches):
    call = getattr(torch.ops.stars, op).default
    names = [argument.name for argument in call._schema.arguments]
    assert list(inspect.signature(LAUNCHERS[op]).parameters) == names
    case = moved(CASES[op], device)
    call.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *(case[name] for name in names))
    assert set(launches) == KERNELS[op]
