import pytest
import torch

from stars_kernels.ops.lm_head_sample import lm_head_sample_ref
from stars_kernels.ops.philox import STREAM_CALIBRATE, STREAM_SAMPLE, token_bits
from stars_kernels.ops.triton.lm_head_sample import lm_head_sample_triton
from tests.chi_square import chi_square
from tests.ops.helpers import dtype_name, generator
from tests.ops.test_segment_sample import EQUALS, LARGE, large_logits, race, rows_of, tied_draws
from tests.ops.triton.conftest import INTERPRETED

DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter gets bfloat16 products wrong"),
    ),
]


def make_case(rows, vocabulary, size, dtype=torch.float32, seed=0):
    """hidden [R, D], weight [V, D]: logits of a spread of about 3."""
    g = generator(seed + vocabulary)
    hidden, weight = torch.randn(rows, size, generator=g), torch.randn(vocabulary, size, generator=g)
    return hidden.to(dtype), (weight * 3 / size**0.5).to(dtype), *rows_of(rows, seed)


def draw(device, case, temperature=1.0, stream=STREAM_SAMPLE):
    token, logprob = lm_head_sample_triton(*(t.to(device) for t in case), temperature, stream)
    assert token.dtype == torch.int64 and logprob.dtype == torch.float32
    return token.cpu(), logprob.cpu()


def assert_as_defined(device, case, temperature=1.0, stream=STREAM_SAMPLE):
    """Tokens of the definition, but where the product's rounding decides; its logprobs, to that rounding."""
    token, logprob = draw(device, case, temperature, stream)
    expected, expected_logprob = lm_head_sample_ref(*case, temperature, stream)
    hidden, weight, keys, attempt, position = case
    logits = (hidden.double() @ weight.double().T) / temperature
    rounding = 4 * torch.finfo(hidden.dtype).eps * logits.abs().amax(dim=1).clamp(min=1.0)
    noisy = race(logits, token_bits(keys, len(weight), position, attempt, stream))
    lost_by = noisy.gather(1, token[:, None])[:, 0] - noisy.amin(dim=1)
    assert (lost_by <= 2 * rounding).all()
    same = token == expected
    print(f"{int((~same).sum())} of {len(token)} tokens decided by rounding")
    assert (~same).sum() <= 1 + len(token) // (10 if hidden.dtype == torch.bfloat16 else 50)
    assert ((logprob - expected_logprob).abs()[same] <= 2 * rounding[same] + 1e-5).all()
    return token, logprob


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 63, 5), (17, 129, 64), (70, 1003, 96)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_tokens_and_logprobs(device, dtype, shape):
    assert_as_defined(device, make_case(*shape, dtype))


@pytest.mark.parametrize("temperature", [0.3, 2.5])
def test_temperature_and_stream(device, temperature):
    case = make_case(40, 300, 16)
    token, _ = assert_as_defined(device, case, temperature)
    other, _ = assert_as_defined(device, case, temperature, STREAM_CALIBRATE)
    assert not torch.equal(token, other)


def test_broken_rows_are_flagged_alone(device):
    case = make_case(6, 300, 16)
    expected, _ = draw(device, case)
    case[0][1, 3], case[0][4, 0] = torch.nan, torch.inf
    token, logprob = draw(device, case)
    assert token[[1, 4]].tolist() == [-1, -1] and logprob[[1, 4]].isnan().all()
    assert torch.equal(token[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])


def test_ties_go_to_the_smallest_id(device):
    """Equal logits: the noise alone decides, as in the definition."""
    hidden, weight, *rows = make_case(50, 260, 8)
    case = (hidden, torch.zeros_like(weight), *rows)
    token, logprob = draw(device, case)
    assert torch.equal(token, lm_head_sample_ref(*case, 1.0, STREAM_SAMPLE)[0])
    torch.testing.assert_close(logprob, torch.full((50,), 1 / 260).log())


@pytest.mark.parametrize("value", LARGE)
def test_equal_logits_are_drawn_equally_at_any_size(device, value):
    """In tiles with none of them, or with nothing but -inf; the product with one hidden number is exact."""
    count = 96
    weight = large_logits(value)[:, None]
    weight[384:512] = -torch.inf
    case = (torch.ones(count, 1), weight, *rows_of(count, seed=6))
    token, logprob = draw(device, case)
    assert torch.equal(token, lm_head_sample_ref(*case, 1.0, STREAM_SAMPLE)[0])
    counts = torch.bincount(token, minlength=800)[EQUALS]
    assert counts.sum() == count and chi_square(counts) > 1e-3
    torch.testing.assert_close(logprob.exp(), torch.full((count,), 0.2))


def test_equal_keys_go_to_the_smallest_id(device):
    """Of two tokens, in two tiles."""
    logits, rows, smaller = tied_draws()
    token, _ = draw(device, (torch.eye(len(logits)), logits.T.contiguous(), *rows))
    assert torch.equal(token, smaller)


def test_a_rows_bits_do_not_depend_on_its_batch(device):
    hidden, weight, *rows = make_case(37, 300, 48)
    token, logprob = draw(device, (hidden, weight, *rows))
    alone = draw(device, (hidden[20:21], weight, *(t[20:21] for t in rows)))
    assert alone[0] == token[20]
    torch.testing.assert_close(alone[1], logprob[20:21], rtol=0, atol=1e-5)
    assert draw(device, (hidden[:0], weight, *(t[:0] for t in rows)))[0].shape == (0,)


def test_strided_inputs(device):
    hidden, weight, *rows = make_case(9, 300, 48)
    views = (hidden.T.contiguous().T, weight.repeat(1, 2)[:, :48], *(torch.stack((t, t), dim=1)[:, 0] for t in rows))
    assert torch.equal(draw(device, views)[0], draw(device, (hidden, weight, *rows))[0])
