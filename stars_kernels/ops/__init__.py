"""The kernels: one file per op, each with its schema, its PyTorch definition, its fake and its public function."""

from stars_kernels.ops.accept import accept
from stars_kernels.ops.add_rms_norm import add_rms_norm
from stars_kernels.ops.content_hash import content_hash
from stars_kernels.ops.dispatch import backends, call_op
from stars_kernels.ops.fork_attention import fork_attention
from stars_kernels.ops.gated import gated
from stars_kernels.ops.kv_commit import kv_commit
from stars_kernels.ops.lm_head_sample import lm_head_sample
from stars_kernels.ops.packed_linear import pack_linear, packed_linear, packed_swiglu
from stars_kernels.ops.registry import DEVICES, reference
from stars_kernels.ops.reward_head import reward_head
from stars_kernels.ops.rms_norm import rms_norm
from stars_kernels.ops.rotary_store import rotary_store
from stars_kernels.ops.segment_sample import segment_sample

__all__ = [
    "DEVICES", "accept", "add_rms_norm", "backends", "call_op", "content_hash", "fork_attention", "gated", "kv_commit",
    "lm_head_sample",
    "pack_linear", "packed_linear", "packed_swiglu", "reference", "reward_head", "rms_norm", "rotary_store",
    "segment_sample",
]  # fmt: skip
