"""Pearson's chi-square test, so that the tests of the samplers need torch alone."""

import torch
from torch import Tensor


def chi_square(observed, expected=None) -> float:
    """Return the p-value of counts [K] under expected counts [K], all equal by default; K - 1 degrees of freedom.

    The tail of the distribution is the regularised upper incomplete gamma function, in float64.

    Raises:
        ValueError: the two do not sum to the same, or an expected count is not above 0.
    """
    found = torch.as_tensor(observed).double()
    wanted = torch.full_like(found, found.mean().item()) if expected is None else _expected(expected, found)
    statistic = ((found - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((len(found) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


def _expected(expected, found: Tensor) -> Tensor:
    given = torch.as_tensor(expected)
    given = given if given.is_floating_point() else given.double()
    eps, wanted = torch.finfo(given.dtype).eps ** 0.5, given.double()
    if not (wanted > 0).all():
        raise ValueError(f"expected counts above 0, found {wanted.tolist()}")
    if abs(wanted.sum() - found.sum()) > eps * found.sum():
        raise ValueError(f"expected counts that sum to {found.sum().item()}, found a sum of {wanted.sum().item()}")
    return wanted
