"""Intervals hold what they say, and a win rate at equal lengths is that of the likeliest fit."""

import numpy as np
import pytest
import torch

from stars_kernels.evaluation import statistics
from stars_kernels.evaluation.statistics import Estimate, estimate, length_controlled


def test_an_interval_is_the_bootstrap_s():
    values = np.random.default_rng(3).normal(2.0, 1.5, 40)
    found = estimate(values)
    assert found == estimate(list(values)) and found.mean == pytest.approx(values.mean())
    error = values.std() / np.sqrt(len(values))  # the bootstrap's own, for a mean
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.05)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.05)


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    rng, held = np.random.default_rng(0), 0
    for _ in range(150):
        found = estimate(rng.normal(0.3, 1.0, 20))
        held += found.low <= 0.3 <= found.high
    assert 0.87 <= held / 150 <= 0.99


def test_blocks_change_nothing(monkeypatch):
    values = np.random.default_rng(1).normal(size=25)
    whole = estimate(values)
    monkeypatch.setattr(statistics, "BLOCK", 1000)
    assert estimate(values) == whole


def test_few_values():
    assert estimate([]) is None and estimate([2.0]) == Estimate(2.0, None, None)
    assert estimate([1.0, 1.0]) == Estimate(1.0, 1.0, 1.0)


def pairs(count=400, at_zero=0.3, slope=1.2, seed=0):
    """Wins that follow the model, with ties."""
    rng = np.random.default_rng(seed)
    differences = rng.integers(-40, 60, count)
    chances = 1 / (1 + np.exp(-(at_zero + slope * np.tanh(differences / differences.std()))))
    wins = (rng.random(count) < chances).astype(float)
    wins[rng.random(count) < 0.1] = 0.5
    return wins, differences


def test_length_controlled_is_the_likeliest_fit():
    wins, differences = pairs()
    y, x = torch.tensor(wins), torch.tensor(np.tanh(differences / differences.std()))
    fit = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([fit], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(fit[0] + fit[1] * x, y)
        value.backward()
        return value

    optimiser.step(loss)
    assert length_controlled(wins, differences) == pytest.approx(fit[0].sigmoid().item(), abs=1e-6)


def test_length_is_taken_out():
    """Here longer answers win, and more of them are longer; at equal lengths there is no winner."""
    wins, differences = pairs(4000, at_zero=0.0, slope=2.0)
    assert wins.mean() > 0.55 and length_controlled(wins, differences) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("wins", "differences"),
    [
        ([1.0] * 9, [1] * 9),  # too few
        ([1.0, 0.0] * 8, [3] * 16),  # all equally longer: nothing says what equal lengths would do
        ([1.0] * 12, list(range(12))),  # no loss: the fit has no end
        ([0.0] * 8 + [1.0] * 8, [*range(-8, 0), *range(1, 9)]),  # the length tells wins from losses
        ([], []),
    ],
)
def test_what_cannot_be_fitted_is_not_made_up(wins, differences):
    assert length_controlled(wins, differences) is None


def test_equal_lengths_need_no_control():
    assert length_controlled([1.0, 0.0, 0.5, 1.0, 1.0] * 2, [0] * 10) == pytest.approx(0.7)
