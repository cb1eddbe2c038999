"""The ops on a GPU: one file an op, with its Triton kernels and `<op>_triton`, which takes the op's arguments."""

from collections.abc import Callable
from typing import Any

from stars_kernels.ops.triton.accept import accept_triton
from stars_kernels.ops.triton.add_rms_norm import add_rms_norm_triton
from stars_kernels.ops.triton.fork_attention import fork_attention_triton
from stars_kernels.ops.triton.gated import gated_triton
from stars_kernels.ops.triton.kv_commit import kv_commit_triton
from stars_kernels.ops.triton.lm_head_sample import lm_head_sample_triton
from stars_kernels.ops.triton.reward_head import reward_head_triton
from stars_kernels.ops.triton.rms_norm import rms_norm_triton
from stars_kernels.ops.triton.rotary_store import rotary_store_triton
from stars_kernels.ops.triton.segment_sample import segment_sample_triton

LAUNCHERS: dict[str, Callable[..., Any]] = {
    "accept": accept_triton,
    "add_rms_norm": add_rms_norm_triton,
    "fork_attention": fork_attention_triton,
    "gated": gated_triton,
    "kv_commit": kv_commit_triton,
    "lm_head_sample": lm_head_sample_triton,
    "reward_head": reward_head_triton,
    "rms_norm": rms_norm_triton,
    "rotary_store": rotary_store_triton,
    "segment_sample": segment_sample_triton,
}
