"""How often a GPU compiles each Triton kernel over all rounds that a model may meet: a stated number.

Run as a module, this file counts: under pytest Triton may be in its interpreter (tests/conftest.py).
"""

import itertools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from bench import gpu_code

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
HEADS, LAYERS, VOCABULARY, HIDDEN = (32, 8, 128), 32, 128256, 4096  # of a Llama-3-8B
PROMPTS = (*range(1, 20), 23, 31, 32, 33, 48, 63, 64)
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 11, 16, 20)  # up to 1280 rows
STEPS = (1, 2, 7, 15, 16, 17, 32, 64)  # tokens of a segment, or of a prompt that is read
PREFIXES = (1, 2, 15, 16, 100, 256, 257, 1152, 4096, 8191, 8192)  # slots a prompt
VARIANTS = {
    "attention bf16": {"_fork_attention": 1, "_merge": 1},
    "attention fp32": {"_fork_attention": 1, "_merge": 1},
    "attention bf16, window": {"_fork_attention": 1, "_merge": 1},
    # top-k, top-p and both
    "sample": {"_race": 1, "_finish": 1, "_groups": 2, "_bound": 3, "_gather": 1, "_draw": 3},
    "lm_head": {"_lm_head_race": 3, "_lm_head_finish": 1},  # 16, 32 or 64 rows a program
    "reward": {"_reward_head": 1},
    "norm": {"_rms_norm": 1},
    "residual": {"_add_rms_norm": 1},
    "MLP": {"_gated": 1},
    "RoPE": {"_rotary_store": 1},
    "commit": {"_commit": 1},
    "accept": {"_accept": 1},
}


def rounds():
    """The launches of each case of VARIANTS, by name."""
    from bench.gpu_cases import (
        FILTERS,
        add_norm_rows,
        attention,
        commit,
        gate_rows,
        judge,
        norm_rows,
        reward,
        sample,
        sample_head,
        store,
    )

    shapes = [{"prompts": p, "rows": p * width} for p, width in itertools.product(PROMPTS, WIDTHS)]
    prefixes = [{"prefix": prefix} for prefix in PREFIXES]
    steps = [{"steps": s, "slots": max(s, 15)} for s in STEPS]
    every = [a | b | c for a, b, c in itertools.product(shapes, prefixes, steps)]
    some = every[::29]  # all values of each
    yield "attention bf16", [partial(attention, "bf16", *HEADS, **call) for call in some]
    yield "attention fp32", [partial(attention, "fp32", *HEADS, **call) for call in some]
    windows = itertools.cycle((1, 100, 512, 4096))
    yield (
        "attention bf16, window",
        [partial(attention, "bf16", *HEADS, window=w, **call) for w, call in zip(windows, some, strict=False)],
    )
    yield (
        "sample",
        [partial(sample, "bf16", VOCABULARY, f, n) for f, n in itertools.product(FILTERS.values(), (*PROMPTS, 1280))],
    )
    yield (
        "lm_head",
        [partial(sample_head, "bf16", VOCABULARY, HIDDEN, rows) for rows in (*range(1, 66), 100, 512, 1280)],
    )
    rows = itertools.product((*PROMPTS, 1280), STEPS)
    yield "reward", [partial(reward, "bf16", HIDDEN, True, n, s) for n, s in rows]
    yield "norm", [partial(norm_rows, "bf16", HIDDEN, n) for n in (*PROMPTS, 1280)]
    yield "residual", [partial(add_norm_rows, "bf16", HIDDEN, n) for n in (*PROMPTS, 1280)]
    yield "MLP", [partial(gate_rows, "bf16", 14336, "silu", n) for n in (*PROMPTS, 1280)]
    written = [{name: n for name, n in call.items() if name in ("rows", "steps", "slots")} for call in some]
    yield "RoPE", [partial(store, "bf16", *HEADS, **call) for call in written]
    calls = [{name: n for name, n in call.items() if name != "slots"} for call in some]
    yield "commit", [partial(commit, "bf16", LAYERS, *HEADS[1:], **call) for call in calls]
    yield "accept", [partial(judge, "fp32", False, p, width) for p, width in itertools.product(PROMPTS, WIDTHS)]


def test_kernels_are_compiled_a_stated_number_of_times():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.test_gpu_variants"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == VARIANTS


if __name__ == "__main__":
    print(json.dumps({name: gpu_code.variants(launches, "sm_90") for name, launches in rounds()}))
