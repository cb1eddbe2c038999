import copy
import math

import pytest
import torch

from stars_kernels.ops import accept
from stars_kernels.ops.accept import ACCEPTED, FALLBACK, NAN, RETRY
from stars_kernels.ops.philox import accept_uniform, request_key
from tests.ops.helpers import generator, longs, strided

NONE = math.nan, -1  # a running best before the first attempt


def accepts(reward, tau, beta, hard, u):
    if hard:
        return reward >= tau
    distance = (reward - tau) / beta
    return distance >= 0 or u < math.exp(distance)


def judge(rewards, valid, taus, u, beta, hard, first_attempt, max_attempts, best_reward, best_attempt):
    """One prompt, one attempt after the other: (chosen, outcome, best reward, best attempt)."""
    chosen = -1
    for column, (reward, tau) in enumerate(zip(rewards, taus, strict=True)):
        if not valid[column]:
            continue
        attempt = first_attempt + column
        if math.isnan(reward):
            return column, NAN, best_reward, best_attempt
        if accepts(reward, tau, beta, hard, u[column]):
            return column, ACCEPTED, best_reward, best_attempt
        if best_attempt < 0 or reward > best_reward:
            chosen, best_reward, best_attempt = column, reward, attempt
        if attempt == max_attempts - 1:
            return chosen, FALLBACK, best_reward, best_attempt
    return chosen, RETRY, best_reward, best_attempt


def make_case(prompts, width, seed=0, dtype=torch.float32, max_attempts=6, beta=0.7, hard=False, first=None):
    g = generator(seed)
    rewards = torch.randint(-3, 4, (prompts, width), generator=g).to(dtype) * 0.5  # many ties
    odd = torch.rand(prompts, width, generator=g)
    rewards[odd < 0.04] = torch.nan
    rewards[(odd > 0.04) & (odd < 0.07)] = torch.inf
    rewards[(odd > 0.07) & (odd < 0.12)] = -torch.inf
    if first is None:
        first = torch.randint(0, max_attempts, (prompts,), generator=g)
    return {
        "rewards": rewards,
        "valid": torch.rand(prompts, width, generator=g) > 0.15,
        "thresholds": 1.0 + torch.randint(0, 3, (prompts, width), generator=g).double() * 0.5,
        "keys": torch.randint(-(2**62), 2**62, (prompts,), generator=g),
        "position": torch.randint(0, 128, (prompts,), generator=g),
        "first_attempt": first,
        "best_reward": torch.full((prompts,), NONE[0], dtype=torch.float64),
        "best_attempt": torch.full((prompts,), NONE[1]),
        "max_attempts": max_attempts,
        "beta": beta,
        "hard": hard,
    }


def expected_of(case):
    """What `judge` says for each prompt: chosen, outcome, best_reward, best_attempt."""
    prompts, width = case["rewards"].shape
    attempts = case["first_attempt"][:, None] + torch.arange(width)
    u = accept_uniform(case["keys"][:, None], case["position"][:, None], attempts)
    verdicts = [
        judge(
            *(case[name][p].tolist() for name in ("rewards", "valid", "thresholds")),
            u[p].tolist(),
            case["beta"],
            case["hard"],
            case["first_attempt"][p].item(),
            case["max_attempts"],
            case["best_reward"][p].item(),
            case["best_attempt"][p].item(),
        )
        for p in range(prompts)
    ]
    chosen, outcome, best_reward, best_attempt = zip(*verdicts, strict=True) if verdicts else ([],) * 4
    return (
        longs(*chosen),
        longs(*outcome),
        torch.tensor(best_reward, dtype=torch.float64),
        longs(*best_attempt),
    )


def assert_judged(case):
    expected = expected_of(case)
    chosen, outcome = accept(**case)
    found = (chosen, outcome, case["best_reward"], case["best_attempt"])
    names = ("chosen", "outcome", "best_reward", "best_attempt")
    for name, a, b in zip(names, found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    return outcome


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("width", [1, 2, 5, 9])
def test_against_the_sequential_judge(impl, width, dtype, hard):
    outcome = assert_judged(make_case(400, width, seed=width, dtype=dtype, hard=hard))
    assert set(outcome.tolist()) == {RETRY, ACCEPTED, FALLBACK, NAN}


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_calls_in_sequence(impl, hard):
    """Rounds of 3 attempts with one running best."""
    case = make_case(300, 3, first=torch.zeros(300, dtype=torch.int64), max_attempts=9, hard=hard)
    for round_number in range(3):
        case |= {"first_attempt": torch.full((300,), 3 * round_number)}
        fresh = make_case(300, 3, seed=round_number)
        assert_judged(case | {name: fresh[name] for name in ("rewards", "valid", "thresholds")})
    assert (case["best_attempt"] >= 3).any() and (case["best_attempt"] < 3).any()


def decide(case, width):
    """Judge a case `width` columns at a time until each prompt is decided: [P, 2] of (outcome, attempt)."""
    prompts, total = case["rewards"].shape
    decided = torch.full((prompts, 2), -1)
    best = {name: case[name].clone() for name in ("best_reward", "best_attempt")}
    active = torch.ones(prompts, dtype=torch.bool)
    for first in range(0, total, width):
        columns = {name: case[name][:, first : first + width] for name in ("rewards", "valid", "thresholds")}
        columns["valid"] = columns["valid"] & active[:, None]
        first_attempt = torch.full((prompts,), first)
        chosen, outcome = accept(**(case | columns | best | {"first_attempt": first_attempt}))
        attempt = torch.where(outcome == FALLBACK, best["best_attempt"], first + chosen)
        ended = active & (outcome != RETRY)
        decided[ended] = torch.stack((outcome, attempt), dim=1)[ended]
        active &= ~ended
    return decided


@pytest.mark.parametrize("width", [2, 3, 4, 12])
def test_width_changes_no_decision(impl, width):
    case = make_case(300, 12, max_attempts=12, first=torch.zeros(300, dtype=torch.int64), beta=0.3)
    case["valid"] = torch.ones_like(case["valid"])
    one_by_one = decide(case, 1)
    assert set(one_by_one[:, 0].tolist()) == {ACCEPTED, FALLBACK, NAN}
    assert torch.equal(decide(case, width), one_by_one)


def hard_case(rewards, **changes):
    """One prompt, tau = 0, its attempts numbered from 0."""
    rewards = torch.tensor([rewards], dtype=torch.float64)
    case = {
        "rewards": rewards,
        "valid": torch.ones_like(rewards, dtype=torch.bool),
        "thresholds": torch.zeros_like(rewards),
        "keys": longs(0),
        "position": longs(0),
        "first_attempt": longs(0),
        "best_reward": torch.tensor([NONE[0]], dtype=torch.float64),
        "best_attempt": longs(NONE[1]),
        "max_attempts": 4,
        "beta": 1.0,
        "hard": True,
    }
    return case | changes


nan, inf = math.nan, math.inf
BY_HAND = [
    # rewards, changes, (chosen, outcome, best attempt)
    pytest.param([-1, 2, 3], {}, (1, ACCEPTED, 0), id="first accepted wins"),
    pytest.param([0.0], {}, (0, ACCEPTED, -1), id="hard accepts at tau"),
    pytest.param([-2, -1, -1, -3], {}, (1, FALLBACK, 1), id="ties stay with the lower attempt"),
    pytest.param([-2, -1, -3, -4, 5], {}, (1, FALLBACK, 1), id="attempt max_attempts is not judged"),
    pytest.param([-2, -1, -3, -4, -0.5], {}, (1, FALLBACK, 1), id="nor does it become the best"),
    pytest.param([-2, -1, -3, -4, nan], {}, (1, FALLBACK, 1), id="nor is its NaN seen"),
    pytest.param([-2, -1, -3, 5], {}, (3, ACCEPTED, 1), id="the last attempt may be accepted"),
    pytest.param([-2, -1, -3, nan], {}, (3, NAN, 1), id="NaN at the last attempt"),
    pytest.param([-1, nan, 5], {}, (1, NAN, 0), id="NaN before a winner"),
    pytest.param([5, nan], {}, (0, ACCEPTED, -1), id="NaN beyond the winner"),
    pytest.param([-2, -1], {"first_attempt": longs(2)}, (1, FALLBACK, 3), id="later round"),
    pytest.param([-2], {"max_attempts": 1}, (0, FALLBACK, 0), id="one attempt"),
    pytest.param([-1 - 1e-12, -1], {}, (1, RETRY, 1), id="float64 rewards keep their digits"),
    pytest.param([-1e-12], {}, (0, RETRY, 0), id="just below tau"),
    pytest.param([-inf, -inf], {}, (0, RETRY, 0), id="-inf becomes the best when first"),
    pytest.param([-inf, -5], {}, (1, RETRY, 1), id="-inf is beaten"),
    pytest.param([inf], {"hard": False}, (0, ACCEPTED, -1), id="inf is accepted"),
    pytest.param([-inf], {"hard": False}, (0, RETRY, 0), id="soft -inf is rejected"),
    pytest.param([1e300], {"hard": False, "beta": 1e-10}, (0, ACCEPTED, -1), id="exp overflows"),
    pytest.param([nan, 5, -1], {"valid": torch.tensor([[False, False, True]])}, (2, RETRY, 2), id="invalid columns"),
    pytest.param([5, nan], {"valid": torch.tensor([[False, False]])}, (-1, RETRY, -1), id="nothing valid"),
    pytest.param(
        [-2, -3],
        {"best_reward": torch.tensor([-1.0]).double(), "best_attempt": longs(0), "first_attempt": longs(1)},
        (-1, RETRY, 0),
        id="an earlier round was better",
    ),
    pytest.param(
        [-2, -1],
        {"best_reward": torch.tensor([-1.0]).double(), "best_attempt": longs(0), "first_attempt": longs(2)},
        (-1, FALLBACK, 0),
        id="fallback to an earlier round",
    ),
]


@pytest.mark.parametrize(("rewards", "changes", "expected"), BY_HAND)
def test_by_hand(impl, rewards, changes, expected):
    case = copy.deepcopy(hard_case(rewards, **changes))  # each impl gets its own
    before = case["best_attempt"].item()
    chosen, outcome = accept(**case)
    assert (chosen.item(), outcome.item(), case["best_attempt"].item()) == expected
    if case["best_attempt"].item() != before:
        column = case["best_attempt"].item() - case["first_attempt"].item()
        assert case["best_reward"].item() == case["rewards"][0, column].item()


@pytest.mark.parametrize(("prompts", "width"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_judge(impl, prompts, width):
    case = make_case(prompts, width)
    chosen, outcome = accept(**case)
    assert chosen.tolist() == [-1] * prompts and outcome.tolist() == [RETRY] * prompts
    assert chosen.dtype == outcome.dtype == torch.int64
    assert case["best_attempt"].tolist() == [-1] * prompts


@pytest.mark.parametrize("distance", [-3.0, -1.0, -0.05, 0.0, 2.0])
@pytest.mark.parametrize("beta", [0.5, 4.0])
def test_acceptance_frequency(impl, distance, beta):
    """100,000 attempts over prompts, positions and rounds."""
    prompts, width = 20_000, 5
    i = torch.arange(prompts)
    keys = longs(*(request_key(0, k) for k in range(10)))
    _, outcome = accept(
        torch.full((prompts * width, 1), 1.5 + distance, dtype=torch.float64),
        torch.ones(prompts * width, 1, dtype=torch.bool),
        torch.full((prompts * width, 1), 1.5, dtype=torch.float64),
        keys[i % 10].repeat(width),
        (i // 10 % 100).repeat(width),
        (i // 1000 * width).repeat(width) + torch.arange(width).repeat_interleave(prompts),
        torch.zeros(prompts * width, dtype=torch.float64),
        torch.full((prompts * width,), -1),
        max_attempts=1000,
        beta=beta,
    )
    count, p = prompts * width, min(1.0, math.exp(distance / beta))
    accepted = (outcome == ACCEPTED).sum().item()
    assert abs(accepted - count * p) <= 4 * math.sqrt(count * p * (1 - p))


def test_one_uniform_an_attempt(impl):
    """A column's u belongs to its attempt, whatever the column: rounds of one and of five agree."""
    case = make_case(200, 5, max_attempts=100, first=torch.zeros(200, dtype=torch.int64), beta=1.0)
    case["rewards"], case["valid"] = torch.zeros(200, 5), torch.ones(200, 5, dtype=torch.bool)
    accepted = []
    for column in range(5):
        shifted = case | {"rewards": torch.zeros(200, 1), "valid": case["valid"][:, :1]}
        shifted |= {"thresholds": case["thresholds"][:, column : column + 1]}
        shifted |= {"first_attempt": torch.full((200,), column), "best_attempt": torch.full((200,), -1)}
        accepted.append(accept(**shifted)[1] == ACCEPTED)
    chosen, outcome = accept(**case)
    first = torch.stack(accepted, dim=1).int().argmax(dim=1)
    assert torch.equal(outcome == ACCEPTED, torch.stack(accepted, dim=1).any(dim=1))
    assert torch.equal(chosen[outcome == ACCEPTED], first[outcome == ACCEPTED])
    assert len(first.unique()) == 5


def test_running_best_is_written_in_place_and_nothing_else(impl):
    case = make_case(100, 4)
    tensors = {name: t for name, t in case.items() if isinstance(t, torch.Tensor)}
    before = {name: t.clone() for name, t in tensors.items()}
    accept(**case)
    for name, tensor in tensors.items():
        same = torch.equal(tensor.nan_to_num(77), before[name].nan_to_num(77))
        assert same == (name not in ("best_reward", "best_attempt")), name


def test_strided_inputs(impl):
    case = make_case(50, 5)
    views = {name: strided(t) if isinstance(t, torch.Tensor) else t for name, t in case.items()}
    expected = accept(**case)
    found = accept(**views)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(views["best_attempt"], case["best_attempt"])
    assert torch.equal(views["best_reward"].nan_to_num(77), case["best_reward"].nan_to_num(77))


ERRORS = [
    ("rewards", lambda t: t[0], r"rewards has shape \[4\], expected \[\*, \*\]"),
    (
        "rewards",
        lambda t: t.half(),
        "dtype torch.float16, expected torch.float32 or torch.float64",
    ),
    ("valid", lambda t: t[:, :2], r"valid has shape \[3, 2\], expected \[3, 4\]"),
    ("valid", lambda t: t.int(), "valid has dtype torch.int32, expected torch.bool"),
    ("thresholds", lambda t: t[:1], r"thresholds has shape \[1, 4\], expected \[3, 4\]"),
    ("thresholds", lambda t: t.float(), "thresholds has dtype torch.float32, expected torch.float64"),
    ("keys", lambda t: t[:1], r"keys has shape \[1\], expected \[3\]"),
    ("position", lambda t: t.int(), "position has dtype torch.int32, expected torch.int64"),
    ("first_attempt", lambda t: t[None], r"first_attempt has shape \[1, 3\], expected \[3\]"),
    ("best_attempt", lambda t: t.double(), "best_attempt has dtype torch.float64, expected torch.int64"),
    ("best_reward", lambda t: t.float(), "best_reward has dtype torch.float32, expected torch.float64"),
    ("max_attempts", lambda _: 0, "max_attempts is 0, expected 1 to 16777216"),
    ("max_attempts", lambda _: 2**24 + 1, "max_attempts is 16777217, expected 1 to 16777216"),
    ("beta", lambda _: 0.0, "beta is 0.0, expected a finite number > 0"),
    ("beta", lambda _: nan, "beta is nan, expected a finite number > 0"),
    ("beta", lambda _: inf, "beta is inf, expected a finite number > 0"),
]


@pytest.mark.parametrize(("name", "change", "message"), ERRORS, ids=[f"{e[0]}-{i}" for i, e in enumerate(ERRORS)])
def test_errors(impl, name, change, message):
    case = make_case(3, 4)
    with pytest.raises(ValueError, match=message):
        accept(**(case | {name: change(case[name])}))
    assert (case["best_attempt"] == -1).all()
    accept(**case)


def test_hard_needs_no_beta(impl):
    case = hard_case([1.0], beta=0.0)
    assert accept(**case)[1].item() == ACCEPTED


def test_schema_tells_the_mutation():
    arguments = torch.ops.stars.accept.default._schema.arguments
    written = {a.name for a in arguments if a.alias_info is not None}
    assert written == {"best_reward", "best_attempt"}


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize(("prompts", "width"), [(6, 3), (0, 2), (2, 0)])
def test_opcheck(prompts, width, hard):
    case = make_case(prompts, width, hard=hard)
    case["best_reward"] = torch.zeros(prompts, dtype=torch.float64)  # opcheck compares values: no NaN
    order = "rewards valid thresholds beta hard keys position first_attempt max_attempts best_reward best_attempt"
    torch.library.opcheck(torch.ops.stars.accept.default, tuple(case[name] for name in order.split()))
