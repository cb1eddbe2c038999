"""Two decodes of one model in two threads are those of one after the other."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import stars_kernels
from stars_kernels.hf.view.copying import view_of
from stars_kernels.hf.view.rewrites import pack
from stars_kernels.hf.view.rewrites import packed as packing
from tests.tiny import tiny_language_model, tiny_reward_model

PROMPTS = [[1, 2, 3], [40], [7, 8, 9, 10]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decodes_side_by_side(dtype):
    lm, rm = tiny_language_model(dtype), tiny_reward_model(dtype)

    def decode(seed):
        settings = dict(seed=seed, reward_threshold=2.0, beta=1.0, max_new_tokens=20, segment_size=4)
        outputs = stars_kernels.decode(lm, rm, PROMPTS, **settings)
        return [(output.token_ids, output.reward) for output in outputs]

    expected = [decode(seed) for seed in range(6)]
    assert len({str(answers) for answers in expected}) == 6
    with ThreadPoolExecutor(max_workers=4) as pool:
        assert list(pool.map(decode, range(6))) == expected


def test_weights_are_packed_once(monkeypatch):
    """Threads that pack one model at the same time share the copy."""
    if not pack(tiny_language_model(torch.float32, seed=8)):
        pytest.skip("packed_linear has no compiled version here")
    lm = tiny_language_model(torch.float32, seed=9)
    packed, real = [], packing.ops.pack_linear

    def slow(*given):
        packed.append(1)
        time.sleep(0.002)  # long enough for another thread to look for the same weight
        return real(*given)

    monkeypatch.setattr(packing.ops, "pack_linear", slow)
    with ThreadPoolExecutor(max_workers=4) as pool:
        sizes = set(pool.map(lambda _: pack(view_of(lm)), range(8)))
    linears = sum(type(module) is torch.nn.Linear for module in lm.modules())
    assert len(sizes) == 1 and len(packed) == linears
