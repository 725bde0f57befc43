"""How close is close: every tolerance of the tests, with the reason for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# In float64, a rewrite that is equal in exact arithmetic.  A sum of n products is off by at most
# n * 2**-53 of the sum of their sizes; n < 100 in the models here, a dozen such sums follow each
# other, and cancellation costs two digits: 100 * 12 * 100 * 2**-53 = 1.3e-11.
EXACT = 2e-11


def rounding(dtype: torch.dtype, steps: int = 64) -> float:
    """Return the relative error of ``steps`` roundings in a row, all in one direction."""
    return steps * torch.finfo(dtype).eps / 2


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """Return the largest difference over the largest value; nan equals nan, at the same place."""
    assert actual.shape == expected.shape
    wide, other = expected.double(), actual.double()
    assert torch.equal(wide.isnan(), other.isnan())
    wide, other = wide.nan_to_num(), other.nan_to_num()
    if not wide.numel():
        return 0.0
    largest = wide.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((wide - other).abs().max() / largest)


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that named tensors are the same ones, bit for bit."""
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name].nan_to_num(), value.nan_to_num()), name


def worst_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest relative error of named tensors."""
    assert list(actual) == list(expected)
    return max(relative_error(value, actual[name]) for name, value in expected.items())


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return seeded normal numbers with a deviation of 3."""
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)
