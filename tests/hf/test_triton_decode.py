"""A whole decode on the Triton kernels, in Triton's interpreter where there is no GPU."""

import pytest
import torch

import stars_kernels
from stars_kernels.ops import dispatch
from stars_kernels.ops.triton import LAUNCHERS
from tests.tiny import tiny_language_model, tiny_reward_model

PROMPTS = [[1, 2, 3], [40]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, tests/hf/test_gpu.py runs the real thing")
def test_tokens_of_the_triton_kernels(monkeypatch):
    lm, rm = tiny_language_model(torch.float32), tiny_reward_model(torch.float32)
    settings = dict(
        seed=2, reward_threshold=2.0, beta=1.0, max_new_tokens=5, segment_size=3, width=2, max_attempts=3, top_k=None
    )
    expected = stars_kernels.decode(lm, rm, PROMPTS, **settings)
    for op, launcher in LAUNCHERS.items():
        monkeypatch.setitem(dispatch.definitions, op, launcher)
    with stars_kernels.reference():
        outputs = stars_kernels.decode(lm, rm, PROMPTS, **settings)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert [o.reward for o in outputs] == pytest.approx([o.reward for o in expected], rel=1e-4, abs=1e-4)
    assert any(len(s.rewards) > 1 for o in outputs for s in o.segments)
