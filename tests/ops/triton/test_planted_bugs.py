"""The kernels' own tests see a bug: each one here is run on a kernel with one line changed."""

import importlib.util
from pathlib import Path

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from stars_kernels.ops.triton import (
    add_rms_norm,
    fork_attention,
    gated,
    kv_commit,
    rms_norm,
    rotary_store,
    segment_sample,
)
from tests.ops.triton import (
    test_add_rms_norm,
    test_fork_attention,
    test_gated,
    test_kv_commit,
    test_rms_norm,
    test_rotary_store,
    test_segment_sample,
)
from tests.ops.triton.conftest import SANITIZED

sanitized = pytest.mark.skipif(not SANITIZED, reason="only ttsem sees it: make sanitize")
TICKET = 'taken = tl.atomic_add(length, TICKET, sem="relaxed")'
COPY = "tl.store(arena + word, tl.load(suffix + word, mask=mask), mask=mask)"


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """plant(module, line, other): the launchers of `module` get kernels in whose source `line` is `other`."""

    def plant(module, line, other):
        source = Path(module.__file__).read_text()
        assert source.count(line) == 1
        file = tmp_path / "planted.py"
        file.write_text(source.replace(line, other))
        spec = importlib.util.spec_from_file_location(module.__name__, file)
        planted = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(planted)
        for name, value in vars(planted).items():
            if isinstance(value, JITFunction | InterpretedFunction) and hasattr(module, name):
                monkeypatch.setattr(module, name, value)

    return plant


def commit(device, monkeypatch):
    test_kv_commit.assert_commits(test_kv_commit.make_case(torch.float32), device)


def norm_a_row(device, monkeypatch):
    test_rms_norm.test_norms(device, torch.float32, (1027,))


def add_a_row(device, monkeypatch):
    test_add_rms_norm.test_is_the_sum_and_its_norm(device, torch.float32, (3, 1027))


def gate(device, monkeypatch):
    test_gated.test_values(device, torch.float32, "silu", (5, 3, 70))


def store(device, monkeypatch):
    test_rotary_store.test_equals_the_models_own_to_the_bit(device, torch.float32, "a prompt")


def attend_in_splits(device, monkeypatch):
    for name, value in (("MAX_SPLITS", 3), ("TARGET_PROGRAMS", 1 << 20), ("SPLIT_KEYS", 8)):
        monkeypatch.setattr(fork_attention, name, value)
    test_fork_attention.test_long_prefix(device, 3, torch.float32)


@sanitized
@pytest.mark.parametrize(
    ("module", "line", "other", "check", "kind", "message"),
    [
        pytest.param(
            kv_commit, COPY, "tl.store(arena + word, tl.load(suffix + word, mask=mask))",
            commit, "oob_write", "past the end of the tensor passed as `arena`", id="a store without its mask",
        ),
        pytest.param(
            kv_commit, COPY, "tl.store(arena + word, tl.load(suffix + word), mask=mask)",
            commit, "oob_read", "past the end of the tensor passed as `suffix`", id="a load without its mask",
        ),
        pytest.param(
            kv_commit, COPY, f"{COPY}; tl.store(lengths + p * lengths_stride, words // TOKEN)",
            commit, "race", "both touch element", id="lengths written while others read them",
        ),
        pytest.param(
            kv_commit, TICKET, f"{TICKET}; taken = tl.load(length)",
            commit, "race", "both touch element", id="a length read beside its ticket",
        ),
        pytest.param(
            rms_norm, "(normed * factor).to(out.dtype.element_ty), mask=there & (d < SIZE))",
            "(normed * factor).to(out.dtype.element_ty), mask=there)",
            norm_a_row, "oob_write", "past the end of the tensor passed as `out`", id="a row's store without its mask",
        ),
        pytest.param(
            add_rms_norm, "tl.store(total + row + d, value, mask=d < SIZE)", "tl.store(total + row + d, value)",
            add_a_row, "oob_write", "past the end of the tensor passed as `total`", id="a sum's store without its mask",
        ),
        pytest.param(
            gated, "(active.to(dtype).to(tl.float32) * factor).to(dtype), mask=i < size)",
            "(active.to(dtype).to(tl.float32) * factor).to(dtype))",
            gate, "oob_write", "past the end of the tensor passed as `out`", id="a product's store without its mask",
        ),
        pytest.param(
            rotary_store, "there = (head < key_heads)[:, None] & (e < VALUE_SIZE)[None, :]",
            "there = (head >= 0)[:, None] & (e < VALUE_SIZE)[None, :]",
            store, "oob_write", "past the end of the tensor passed as `values`", id="values of heads that are none",
        ),
        pytest.param(
            rotary_store, "place = token // steps * room + tl.load(where + token % steps)",
            "place = token // steps * room",
            store, "race", "both touch element", id="all keys in one place",
        ),
        pytest.param(
            fork_attention, "begin_out = place.to(tl.int64) * size", "begin_out = place.to(tl.int64) * 0",
            attend_in_splits, "race", "both touch element", id="all parts are stored in one place",
        ),
    ],
)  # fmt: skip
def test_a_fault_in_a_kernel(device, monkeypatch, plant, module, line, other, check, kind, message):
    plant(module, line, other)
    with pytest.raises(Exception, match=message) as caught:
        check(device, monkeypatch)
    assert caught.value.fault.kind == kind


@pytest.mark.parametrize(
    "line",
    [
        "tl.store(stats + begin_out + at_out, high, mask=written)",
        "tl.store(partial + (begin_out + at_out)[:, None] * DV + dv, acc, mask=written[:, None] & (dv < DV))",
    ],
)
def test_an_unwritten_read(device, monkeypatch, plant, line):
    """Seen wherever the kernel runs: what is allocated starts as NaN, and _merge reads it."""
    plant(fork_attention, line, "pass")
    with pytest.raises(AssertionError) as caught:
        attend_in_splits(device, monkeypatch)
    assert str(caught.traceback[-1].statement).strip() == "assert out.isfinite().all()"


@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("tl.where(weights >= wanted, pivots, first)", "tl.where(weights > wanted, pivots, first)"),
        ("(weights == wanted).to(tl.int32)", "(weights >= wanted).to(tl.int32)"),
        ("tl.where(x[None, :] >= least", "tl.where(x[None, :] > least"),
    ],
    ids=["the last that suffices", "a count that ends the search", "scores at a pivot"],
)
def test_a_fault_in_a_search(device, plant, line, other):
    plant(segment_sample, line, other)
    with pytest.raises(AssertionError):
        test_segment_sample.test_a_search_finds_the_threshold_of_any_weight(device, 30.0)
