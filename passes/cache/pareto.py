"""What is best at its size: Pareto fronts of two costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pareto_front(sizes: Sequence[float], errors: Sequence[float]) -> tuple[int, ...]:
    """Return the indices of the points that no other dominates, smallest first.

    A point dominates another one when it is no larger and no worse, and better in one of the two.
    Equal points do not dominate each other.
    """
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (sizes, errors))
    return tuple(int(i) for i in torch.argsort(x, stable=True) if not bool(_better(x, y, i).any()))


def _better(x: Tensor, y: Tensor, point: Tensor) -> Tensor:
    """Tell of each point whether it dominates ``point``."""
    no_worse = (x <= x[point]) & (y <= y[point])
    return no_worse & ((x < x[point]) | (y < y[point]))


def lower_hull(sizes: Tensor, errors: Tensor) -> list[tuple[int, ...]]:
    """Return the choices on the lower convex hull of summed sizes and errors, largest first.

    For some price p of a size, each row takes the option with the least ``error + p * size``.
    Those are the best choices wherever errors of rows add up, as far as the hull goes.

    Args:
        sizes: [rows, options]; infinite where an option is none of the row's.
        errors: the same shape.
    """
    step = sizes.unsqueeze(2) - sizes.unsqueeze(1)
    prices = (errors.unsqueeze(1) - errors.unsqueeze(2)) / step
    known = prices[(step > 0) & prices.isfinite() & (prices > 0)].sort().values
    # Between two prices at which some row is undecided, all rows are decided.
    between = torch.cat([known[:1] / 2, (known[1:] + known[:-1]) / 2, known[-1:] * 2])
    chosen = [tuple((errors + p * sizes).argmin(1).tolist()) for p in between]
    return list(dict.fromkeys(chosen))
