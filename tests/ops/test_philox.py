import pytest
import torch

from stars_kernels.ops.dispatch import load_extension
from stars_kernels.ops.philox import (
    STREAM_ACCEPT,
    STREAM_CALIBRATE,
    STREAM_SAMPLE,
    accept_uniform,
    philox4x32,
    request_key,
    token_bits,
)
from tests.ops.helpers import generator, longs

# Random123's kat_vectors: (counter, key, output).
KNOWN_ANSWERS = [
    pytest.param("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8", id="zeros"),
    pytest.param("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd", id="ones"),
    pytest.param(
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
        id="pi",
    ),
]
BIG_KEYS = longs(0, -1, request_key(0, 0), request_key(1, "a"), -(2**63), 2**63 - 1)


def python_philox(counter, key):
    words = philox4x32(tuple(longs(c) for c in counter), tuple(longs(k) for k in key))
    return [int(word) for word in words]


def cpp_philox(counter, key):
    from stars_kernels import _C

    return list(_C.philox4x32(counter, key))


@pytest.fixture
def extension():
    reason = load_extension()
    if reason is not None:
        pytest.skip(f"no compiled extension: {reason}")


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    assert python_philox(words(counter), words(key)) == words(output)


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers_cpp(extension, counter, key, output):
    assert cpp_philox(words(counter), words(key)) == words(output)


def test_cpp_equals_pytorch(extension):
    numbers = torch.randint(2**32, (500, 6), generator=generator(0))
    counter, key = numbers[:, :4], numbers[:, 4:]
    expected = torch.stack(philox4x32(tuple(counter.unbind(1)), tuple(key.unbind(1))), dim=1)
    assert [cpp_philox(c, k) for c, k in zip(counter.tolist(), key.tolist(), strict=True)] == expected.tolist()


def test_token_bits_counter_layout():
    """c0 = id >> 2 (word id & 3), c1 = position, c2 = stream << 24 | attempt, c3 = 0; low key word first."""
    ids = longs(0, 1, 2, 3, 4, 130_001)
    for key in BIG_KEYS.tolist():
        bits = token_bits(longs(key), ids[None], longs(7), longs(2**24 - 1), STREAM_CALIBRATE)[0].tolist()
        halves = (key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF)
        for i, found in zip(ids.tolist(), bits, strict=True):
            assert found == python_philox((i >> 2, 7, STREAM_CALIBRATE << 24 | 2**24 - 1, 0), halves)[i & 3]


def test_accept_uniform_counter_layout():
    key = request_key(3, "x")
    bits = python_philox((0, 11, STREAM_ACCEPT << 24 | 5, 0), (key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF))[0]
    assert accept_uniform(longs(key), longs(11), longs(5)).item() == (bits + 0.5) / 2**32


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 4, 5, 101])
def test_bits_by_ids_equal_bits_of_the_vocabulary(vocabulary):
    keys, position, attempt = BIG_KEYS, torch.arange(6), torch.arange(6) * 1000
    whole = token_bits(keys, vocabulary, position, attempt, STREAM_SAMPLE)
    assert whole.shape == (6, vocabulary)
    ids = torch.stack([torch.randperm(vocabulary, generator=generator(r)) for r in range(6)])
    assert torch.equal(token_bits(keys, ids, position, attempt, STREAM_SAMPLE), whole.gather(1, ids))


def test_noise_does_not_depend_on_batch_mates_or_row_order():
    keys, position, attempt = BIG_KEYS, torch.arange(6), torch.arange(6) * 1000
    whole = token_bits(keys, 9, position, attempt, STREAM_SAMPLE)
    order = torch.randperm(6, generator=generator(0))
    shuffled = token_bits(keys[order], 9, position[order], attempt[order], STREAM_SAMPLE)
    assert torch.equal(shuffled, whole[order])
    for r in range(6):
        alone = token_bits(keys[r : r + 1], 9, position[r : r + 1], attempt[r : r + 1], STREAM_SAMPLE)
        assert torch.equal(alone[0], whole[r])


@pytest.mark.parametrize("changed", ["key low", "key high", "position", "attempt", "stream", "nothing"])
def test_noise_depends_on(changed):
    base = {"key": request_key(0, 0), "position": 3, "attempt": 4, "stream": STREAM_SAMPLE}
    step = {"key low": ("key", 1), "key high": ("key", 2**32), "nothing": ("key", 0)}
    name, by = step.get(changed, (changed, 1))

    def bits(key, position, attempt, stream):
        return token_bits(longs(key), 40, longs(position), longs(attempt), stream)[0]

    one, two = bits(**base), bits(**{**base, name: base[name] + by})
    assert one.unique().numel() == 40
    equal = (one == two).sum().item()
    assert equal == (40 if changed == "nothing" else 0)


def test_bits_are_uniform():
    bits = token_bits(longs(request_key(0, 0)), 1 << 20, longs(0), longs(0), STREAM_SAMPLE)[0]
    assert 0 <= bits.min() and bits.max() < 2**32
    for shift in (0, 8, 16, 24):  # chi-square of each byte has mean 255 and standard deviation 22.6
        counts = torch.bincount(bits >> shift & 0xFF, minlength=256).double()
        expected = len(bits) / 256
        assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 4 * 22.6


def test_accept_uniform_is_inside_the_unit_interval(monkeypatch):
    u = accept_uniform(longs(request_key(0, 0)).expand(100_000), longs(0), torch.arange(100_000))
    assert 0 < u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.004 and u.dtype == torch.float64
    for word in (0, 2**32 - 1):
        monkeypatch.setattr("stars_kernels.ops.philox.philox4x32", lambda counter, key, word=word: (longs(word),) * 4)
        assert 0 < accept_uniform(longs(0), longs(0), longs(0)) < 1


def test_request_key():
    names = [(0, 1), (0, "1"), (1, 1), (1, "1"), (11, 1), (1, 11), (0, ""), (0, "é"), (0, -1), (2**70, 0)]
    keys = [request_key(*name) for name in names]
    assert len(set(keys)) == len(names)
    assert keys == [request_key(*name) for name in names]
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert request_key(0, 1) == 2472355101358201911  # another value would change every published answer
