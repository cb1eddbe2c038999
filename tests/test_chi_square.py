"""The chi-square test against printed tables and against its own distribution."""

import pytest
import torch

from tests.chi_square import chi_square


@pytest.mark.parametrize(
    ("freedom", "statistic", "p_value"),
    [
        (1, 3.841, 0.05),
        (1, 10.828, 0.001),
        (4, 9.488, 0.05),
        (4, 0.711, 0.95),
        (10, 29.588, 0.001),
        (100, 149.449, 0.001),
    ],
)
def test_the_quantiles_of_the_tables(freedom, statistic, p_value):
    """One bin carries the whole deviation, taken from another: (d/e)^2 e + (d/e)^2 e = statistic."""
    bins, each = freedom + 1, 1e6
    deviation = (statistic * each / 2) ** 0.5
    observed = torch.full((bins,), each, dtype=torch.float64)
    observed[0] += deviation
    observed[1] -= deviation
    assert chi_square(observed) == pytest.approx(p_value, rel=0.01)
    assert chi_square(observed, torch.full((bins,), each)) == pytest.approx(p_value, rel=0.01)


def test_p_values_are_uniform_under_the_hypothesis_and_small_beside_it():
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
    draws = torch.multinomial(probs, 1000 * 2000, replacement=True, generator=torch.Generator().manual_seed(0))
    counts = torch.stack([torch.bincount(draw, minlength=4) for draw in draws.view(1000, 2000)])
    values = torch.tensor([chi_square(count, probs * 2000) for count in counts])
    for level in (0.01, 0.1, 0.5, 0.9):
        share = (values < level).double().mean().item()
        assert abs(share - level) < 4 * (level * (1 - level) / 1000) ** 0.5
    assert max(chi_square(count, probs.flip(0) * 2000) for count in counts) < 1e-9


def test_what_is_no_pair_of_counts_is_refused():
    with pytest.raises(ValueError, match=r"sum to 30.0, found a sum of 31.0"):
        chi_square([10, 20], [10.0, 21.0])
    with pytest.raises(ValueError, match="expected counts above 0"):
        chi_square([10, 20], [0.0, 30.0])
