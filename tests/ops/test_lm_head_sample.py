import pytest
import torch

from stars_kernels.ops import lm_head_sample, segment_sample
from tests.chi_square import chi_square
from tests.ops.helpers import DTYPES, dtype_name, generator
from tests.ops.test_segment_sample import EQUALS, LARGE, large_logits, rows_of


def make_case(rows=7, vocabulary=120, size=24, dtype=torch.float32):
    g = generator(rows)
    hidden, weight = (torch.randn(n, size, generator=g).to(dtype) for n in (rows, vocabulary))
    return dict(zip(("hidden", "weight", "keys", "attempt", "position"), (hidden, weight, *rows_of(rows)), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_it_is_the_draw_from_the_output_layer(impl, dtype):
    case = make_case(dtype=dtype)
    rows = [case[name] for name in ("keys", "attempt", "position")]
    expected = segment_sample(case["hidden"] @ case["weight"].T, *rows, temperature=0.8, stream=2)
    token, logprob = lm_head_sample(**case, temperature=0.8, stream=2)
    assert torch.equal(token, expected[0])
    torch.testing.assert_close(logprob, expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", LARGE)
def test_equal_logits_are_drawn_equally_at_any_size(impl, value):
    token, _ = lm_head_sample(torch.ones(5000, 1), large_logits(value)[:, None], *rows_of(5000, seed=6))
    counts = torch.bincount(token, minlength=800)[EQUALS]
    assert counts.sum() == 5000 and chi_square(counts) > 1e-3


def test_zero_rows(impl):
    token, logprob = lm_head_sample(**make_case(rows=0))
    assert token.shape == logprob.shape == (0,)


ERRORS = [
    ("hidden", lambda t: t[0], r"hidden has shape \[24\], expected \[\*, \*\]"),
    ("hidden", lambda t: t.long(), "hidden has dtype torch.int64, expected a float dtype"),
    ("weight", lambda t: t[:, :5], r"weight has shape \[120, 5\], expected \[\*, 24\]"),
    ("weight", lambda t: t.half(), "weight has dtype torch.float16, expected torch.float32"),
    ("weight", lambda t: t[:0], r"weight has shape \[0, 24\], expected no empty dimension"),
    ("keys", lambda t: t[:2], r"keys has shape \[2\], expected \[7\]"),
    ("attempt", lambda t: t.int(), "attempt has dtype torch.int32, expected torch.int64"),
    ("temperature", lambda t: 0.0, "temperature is 0.0, expected 1e-30 to 1e"),
    ("stream", lambda t: 256, "stream is 256, expected 0 to 255"),
]


@pytest.mark.parametrize(("name", "change", "message"), ERRORS, ids=[f"{e[0]}-{i}" for i, e in enumerate(ERRORS)])
def test_errors(impl, name, change, message):
    case = make_case()
    lm_head_sample(**case)
    with pytest.raises(ValueError, match=message):
        lm_head_sample(**(case | {name: change(case.get(name))}))


def test_opcheck():
    case = make_case()
    torch.library.opcheck(torch.ops.stars.lm_head_sample.default, [*case.values(), 1.0, 0])
