"""Rotary phases do not depend on whether matrix products may be rounded to TF32."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import stars_kernels
from stars_kernels import versions
from stars_kernels.hf.view import copying
from stars_kernels.hf.view.copying import eval_copy, view_of
from stars_kernels.hf.view.rewrites.rope import OuterProducts, keep_phases_exact
from tests.hf import families
from tests.hf.scoring.test_encoder_rewards import encoder
from tests.tiny import tiny_language_model

PRODUCTS = (torch.ops.aten.matmul.default, torch.ops.aten.bmm.default, torch.ops.aten.mm.default)
"""In inference mode a dispatch mode is asked for the first, else for what it is made of."""
POSITIONS = torch.tensor([[0, 1, 2, 77, 2049, 4001, 100_003]])


def rounded(x):
    """x in fp32, its mantissa cut to the 10 bits of TF32."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class TF32(TorchDispatchMode):
    """fp32 products of one term a sum, as a GPU with TF32 computes them; counts them."""

    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS and args[0].dtype == torch.float32 and args[0].shape[-1] == 1:
            self.seen += 1
            args = tuple(map(rounded, args))
        return function(*args, **(kwargs or {}))


class MatmulRotary(nn.Module):
    """transformers' rotary module up to 5.18."""

    def __init__(self, inv_freq):
        super().__init__()
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @torch.no_grad()
    def forward(self, x, position_ids):
        frequencies = self.inv_freq[None, :, None].expand(position_ids.shape[0], -1, 1).to(dtype=torch.float)
        freqs = (frequencies @ position_ids[:, None, :].float()).transpose(1, 2)
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos().to(x.dtype), emb.sin().to(x.dtype)


@pytest.fixture
def old(monkeypatch):
    """A Llama with the rotary module of transformers 5.17, in a process that believes in that version."""
    monkeypatch.setattr(copying, "rope_by_matmul", lambda: True)
    model = tiny_language_model(torch.float32)
    model.model.rotary_emb = MatmulRotary(model.model.rotary_emb.inv_freq)
    return model


def phases(model):
    return model.model.rotary_emb(torch.zeros(1), POSITIONS)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("size", [1, 8, 64, 128])
def test_bits_are_those_of_the_fp32_matmul(size):
    module = MatmulRotary(1.0 / (1e4 ** (torch.arange(0, size, 2) / size)))
    ids = torch.arange(5000).reshape(2, -1)
    expected = module(torch.zeros(1), ids)
    with OuterProducts():
        assert same(module(torch.zeros(1), ids), expected)


def test_tf32_does_not_reach_a_view(old):
    expected = phases(old)
    with TF32() as tf32:
        assert not same(phases(old), expected), "the instrument works"
        assert tf32.seen == 1
        assert same(phases(view_of(old)), expected)
        assert tf32.seen == 1
    view = view_of(old).model.rotary_emb
    assert isinstance(view, MatmulRotary) and view.inv_freq is old.model.rotary_emb.inv_freq
    assert type(old.model.rotary_emb) is MatmulRotary, "the user's model is left alone"


def test_nor_a_forward_that_was_put_on_the_module(old):
    """As accelerate does for a device_map."""
    rotary = old.model.rotary_emb
    expected = phases(old)
    rotary.forward = rotary.forward
    keep_phases_exact(old)
    with TF32():
        assert same(phases(old), expected)


def test_an_answer_is_that_without_tf32(old, rm):
    settings = dict(seed=0, reward_threshold=1.0, beta=1.0, max_new_tokens=8, width=2, pack=False)
    expected = stars_kernels.decode(old, rm, [list(range(60))], **settings)
    with TF32() as tf32:
        outputs = stars_kernels.decode(old, rm, [list(range(60))], **settings)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert tf32.seen == 0


def test_other_products_and_other_modules_are_left_alone(old):
    a, b = torch.randn(2, 5, 3), torch.randn(2, 3, 4)
    expected = a @ b
    with OuterProducts():
        assert torch.equal(a @ b, expected)
        assert torch.equal(a[0, :, :1] @ b[0, 0, :1], a[0, :, 0] * b[0, 0, 0]), "a vector has no second dimension"
    changed = [name for name, m in view_of(old).named_modules() if type(m) is not type(old.get_submodule(name))]
    layers = [f"model.layers.{i}{part}" for i in range(2) for part in ("", ".self_attn")]  # fused, see `rewrites`
    assert [name for name in changed if "norm" not in name and name not in layers] == ["model.rotary_emb"]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3", "gpt_oss", "granite_swa", "modernbert"])
def test_of_the_installed_transformers(family):
    """Whatever its modules look like: no product that TF32 would round is left in a forward."""
    model = encoder("ModernBertForSequenceClassification") if family == "modernbert" else families.tiny(family)
    with torch.inference_mode(), TF32() as tf32:
        eval_copy(model)(input_ids=torch.arange(40, 50)[None])
    assert tf32.seen == 0


@pytest.mark.parametrize(("version", "expected"), [("5.17.0", True), ("5.18.1", True), ("5.19.0", False)])
def test_versions(monkeypatch, version, expected):
    monkeypatch.setattr(versions, "installed", lambda name: version)
    assert versions.rope_by_matmul() == expected
