import pytest
import torch

from stars_kernels.ops.accept import ACCEPTED, FALLBACK, NAN, RETRY
from stars_kernels.ops.philox import accept_uniform
from stars_kernels.ops.triton.accept import BLOCK, accept_triton
from tests.ops.helpers import longs, moved, strided
from tests.ops.test_accept import BY_HAND, hard_case, make_case
from tests.ops.test_accept_cuda import assert_same, defined


def found_by_triton(case, device):
    """What the kernel writes, by name; `case` keeps its running best."""
    given = moved(case, device)
    for name in ("best_reward", "best_attempt"):
        given[name] = given[name].clone() if case[name].is_contiguous() else strided(case[name].to(device))
    chosen, outcome = accept_triton(**given)
    assert chosen.dtype == outcome.dtype == torch.int64
    for name in set(case) - {"best_reward", "best_attempt"}:
        if isinstance(case[name], torch.Tensor):
            torch.testing.assert_close(given[name].cpu(), case[name], rtol=0, atol=0, equal_nan=True)
    return {name: given[name] for name in ("best_reward", "best_attempt")} | {"chosen": chosen, "outcome": outcome}


def assert_judged(case, device):
    found = found_by_triton(case, device)
    assert_same(found, defined(case))
    return found


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("width", [1, 2, 5, 9])
def test_against_the_definition(device, width, dtype, hard, launches):
    found = assert_judged(make_case(400, width, seed=width, dtype=dtype, hard=hard), device)
    assert set(found["outcome"].tolist()) == {RETRY, ACCEPTED, FALLBACK, NAN}
    assert launches == ["_accept"]


@pytest.mark.parametrize("prompts", [1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_any_number_of_prompts(device, prompts):
    assert_judged(make_case(prompts, 3, seed=prompts), device)


def test_nothing_to_judge(device):
    assert_judged(make_case(0, 3), device)
    assert_judged(make_case(3, 0), device)


@pytest.mark.parametrize(("rewards", "changes", "expected"), BY_HAND)
def test_by_hand(device, rewards, changes, expected):
    found = assert_judged(hard_case(rewards, **changes), device)
    assert tuple(found[name].item() for name in ("chosen", "outcome", "best_attempt")) == expected


def test_calls_in_sequence(device):
    """Rounds of 3 attempts with one running best."""
    case = make_case(100, 3, max_attempts=9)
    for round_number in range(3):
        fresh = make_case(100, 3, seed=round_number, max_attempts=9)
        case |= {name: fresh[name] for name in ("rewards", "valid", "thresholds")}
        found = assert_judged(case | {"first_attempt": torch.full((100,), 3 * round_number)}, device)
        case |= {name: found[name].cpu() for name in ("best_reward", "best_attempt")}
    assert (case["best_attempt"] >= 3).any() and (case["best_attempt"] < 3).any()


def test_strided_inputs(device):
    case = make_case(50, 5)
    views = {name: strided(value) if isinstance(value, torch.Tensor) else value for name, value in case.items()}
    assert_same(found_by_triton(views, device), defined(case))


@pytest.mark.parametrize("beta", [1e-320, 0.1, 1 / 3, 1e300])
def test_a_threshold_between_two_numbers_of_float64(device, beta):
    """Rewards that lie one step of float64 on either side of where u decides: beta, u and exp are float64."""
    prompts = 64
    case = make_case(prompts, 1, dtype=torch.float64, beta=beta, first=torch.zeros(prompts, dtype=torch.int64))
    u = accept_uniform(case["keys"], case["position"], case["first_attempt"])
    reward = u.log() * beta  # tau is 0
    case |= {"valid": torch.ones(prompts, 1).bool(), "thresholds": torch.zeros(prompts, 1).double()}
    outcomes = []
    for towards, by in ((-torch.inf, 1 + 1e-12), (torch.inf, 1 - 1e-12)):
        near = torch.nextafter(reward * by, torch.tensor(towards, dtype=torch.float64))
        outcomes.append(assert_judged(case | {"rewards": near[:, None]}, device)["outcome"].cpu())
    assert (outcomes[0] == RETRY).all() and (outcomes[1] == ACCEPTED).all()


def test_keys_positions_and_attempts_of_any_size(device):
    """All bits of a key, a position and an attempt take part."""
    keys = longs(0, -1, 1 << 62, -(1 << 63), (1 << 32) - 1, 1 << 32, 12345, -9876543210)
    first = (1 << 24) - 1
    for position in (0, (1 << 31), (1 << 32) - 1):
        case = make_case(8, 1, dtype=torch.float64, max_attempts=1 << 24, beta=1.0, first=torch.full((8,), first))
        case |= {"keys": keys, "position": torch.full((8,), position), "valid": torch.ones(8, 1).bool()}
        u = accept_uniform(keys, case["position"], case["first_attempt"])
        case |= {"thresholds": torch.zeros(8, 1).double()}
        for by, expected in ((1 + 1e-9, FALLBACK), (1 - 1e-9, ACCEPTED)):
            found = assert_judged(case | {"rewards": (u.log() * by)[:, None]}, device)
            assert (found["outcome"] == expected).all()
