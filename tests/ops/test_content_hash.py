import pytest
import torch

from stars_kernels.ops import content_hash
from stars_kernels.ops.content_hash import content_hash_ref
from tests.ops.helpers import compiled, generator, strided

MASK = (1 << 64) - 1


def splitmix(z):
    """The published finalizer, on Python's integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def by_hand(octets):
    words = [int.from_bytes(octets[i : i + 8], "little") for i in range(0, len(octets), 8)]
    total = sum(splitmix((w + (i + 1) * 0x9E3779B97F4A7C15) & MASK) for i, w in enumerate(words)) & MASK
    return total - (1 << 64) if total >> 63 else total


def test_splitmix64s_published_numbers():
    """The first numbers of the generator seeded with 1234567."""
    state, found = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        found.append(splitmix(state))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 4), (7, 1, 11), (1009,)], ids=str)
def test_is_the_sum_written_by_hand(impl, dtype, shape):
    x = (torch.rand(shape, generator=generator(0)) * 300 - 100).to(dtype)
    assert content_hash(x) == by_hand(x.flatten().view(torch.uint8).numpy().tobytes())
    if shape:
        assert content_hash(strided(x)) == content_hash(x)


@pytest.mark.parametrize("offset", [1, 3])
def test_any_alignment(impl, offset):
    flat = torch.randn(offset + 35, generator=generator(1))
    x = flat[offset:].view(5, 7)
    assert content_hash(x) == content_hash(x.clone())


def test_many_words_on_several_threads():
    if not compiled("content_hash"):
        pytest.skip("the definition has no threads of its own")
    x = torch.randn(1 << 21, generator=generator(2))[1:]  # longer than a chunk of the definition, and odd
    assert content_hash(x) == int(content_hash_ref(x))


def test_every_move_and_every_bit_shows(impl):
    x = torch.randn(12, 10, generator=generator(3))
    moves = {
        "as it is": x, "rows flipped": x.flip(0), "columns flipped": x.flip(1), "rolled": x.roll(1, 0),
        "rolled by a word": x.flatten().roll(2).view_as(x), "sorted": x.sort(0).values, "negated": -x,
        "two rows swapped": x[[1, 0, *range(2, 12)]], "zeros": 0 * x.abs(), "negative zeros": -0.0 * x.abs(),
    }  # fmt: skip
    negated = x.clone()
    negated[:, 3] *= -1
    moves["a column negated"] = negated
    for word in (0, 59, 119):
        for bit in (0, 13, 31):
            one = x.clone()
            one.view(torch.int32).view(-1)[word] ^= torch.tensor(
                1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32
            )
            moves[f"bit {bit} of word {word}"] = one
    hashes = {name: content_hash(moved) for name, moved in moves.items()}
    assert len(set(hashes.values())) == len(moves), hashes


def test_opcheck():
    torch.library.opcheck(torch.ops.stars.content_hash.default, (torch.randn(5, 7),))
