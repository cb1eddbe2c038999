import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from stars_kernels.ops import rotary_store
from tests.ops.helpers import DTYPES, bits_of, dtype_name, generator, strided

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
SHAPES = {  # batch, steps, query heads, heads, size, value size, room, whether all of the batch share their phases
    "a step": (5, 1, 6, 2, 8, 8, 7, False),
    "a wide group": (2, 3, 9, 1, 64, 64, 5, False),
    "a prompt": (1, 37, 4, 4, 16, 24, 50, False),
    "shared phases": (3, 2, 10, 10, 128, 128, 3, True),
    "odd heads": (2, 2, 3, 3, 20, 12, 2, False),
}


def make_case(dtype=torch.float32, shape="a step", seed=0):
    batch, steps, query_heads, heads, size, value_size, room, shared = SHAPES[shape]
    g = generator(seed)

    def normal(*sizes):
        return torch.randn(sizes, generator=g, dtype=torch.float64).to(dtype)

    phases = torch.randn(1 if shared else batch, steps, size, generator=g, dtype=torch.float64) * 30
    return {
        "query": normal(batch, steps, query_heads, size),
        "key": normal(batch, steps, heads, size),
        "value": normal(batch, steps, heads, value_size),
        "cos": phases.cos().to(dtype),
        "sin": phases.sin().to(dtype),
        "where": torch.randperm(room, generator=g)[:steps],
        "keys": normal(batch, room, heads, size),
        "values": normal(batch, room, heads, value_size),
    }


def expected_of(case):
    """By transformers' own function: the queries, and all that is kept."""
    turned = apply_rotary_pos_emb(*(case[name].transpose(1, 2) for name in ("query", "key")), case["cos"], case["sin"])
    query, key = (x.transpose(1, 2) for x in turned)
    keys, values = case["keys"].clone(), case["values"].clone()
    keys[:, case["where"]], values[:, case["where"]] = key, case["value"]
    return query, keys, values


def run(case, op=rotary_store):
    kept = {"keys": case["keys"].clone(), "values": case["values"].clone()}
    return op(*(case | kept).values()), kept["keys"], kept["values"]


@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_models_own_to_the_bit(impl, dtype, shape):
    case = make_case(dtype, shape)
    for found, expected in zip(run(case), expected_of(case), strict=True):
        assert found.dtype == dtype and torch.equal(bits_of(found), bits_of(expected))


def test_odd_inputs(impl):
    case = make_case(shape="a prompt")
    expected = run(case)
    for name in ("query", "key", "value", "cos", "sin", "where"):
        other = case | {name: strided(case[name])}
        assert all(map(torch.equal, run(other), expected)), name
    heads_first = {n: case[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("query", "key", "value")}
    assert all(map(torch.equal, run(case | heads_first), expected))
    joined = torch.cat([case[n].flatten(2) for n in ("query", "key", "value")], dim=-1)  # as one product gives them
    sizes = [case[n].flatten(2).shape[-1] for n in ("query", "key", "value")]
    parts = (part.unflatten(-1, case[n].shape[2:]) for part, n in zip(joined.split(sizes, -1), case, strict=False))
    assert all(map(torch.equal, run(case | dict(zip(case, parts, strict=False))), expected))
    empty = {n: case[n][:, :0] for n in ("query", "key", "value", "cos", "sin")} | {"where": case["where"][:0]}
    query, keys, values = run(case | empty)
    assert query.shape == (1, 0, 4, 16) and keys.equal(case["keys"]) and values.equal(case["values"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(query=torch.zeros(5, 1, 6, 7)), r"query has heads of 7, expected an even number"),
        (dict(key=torch.zeros(5, 1, 2, 6)), r"key has shape \[5, 1, 2, 6\], expected \[5, 1, \*, 8\]"),
        (dict(value=torch.zeros(5, 1, 3, 8)), r"value has shape \[5, 1, 3, 8\], expected \[5, 1, 2, \*\]"),
        (dict(cos=torch.zeros(4, 1, 8)), r"cos has shape \[4, 1, 8\], expected \[5, 1, 8\]"),
        (dict(sin=torch.zeros(5, 1, 8).double()), r"sin has dtype torch.float64, expected torch.float32"),
        (dict(where=torch.zeros(2, dtype=torch.int64)), r"where has shape \[2\], expected \[1\]"),
        (dict(keys=torch.zeros(5, 2, 7, 8).transpose(1, 2)), r"keys has strides .*, expected it contiguous"),
        (dict(values=torch.zeros(5, 6, 2, 8)), r"values has shape \[5, 6, 2, 8\], expected \[5, 7, 2, 8\]"),
    ],
)
def test_errors(impl, changes, message):
    with pytest.raises(ValueError, match=message):
        rotary_store(**make_case() | changes)


def test_a_place_that_is_none(impl):
    with pytest.raises(IndexError, match="7"):
        rotary_store(**make_case() | {"where": torch.tensor([7])})


def test_opcheck():
    torch.library.opcheck(torch.ops.stars.rotary_store.default, tuple(make_case(shape="a wide group").values()))
