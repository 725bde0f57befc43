"""Widths for blocks by what rounding them costs: predicted, searched, and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Table = tuple[int, ...]  # for each unit, the index of a width
Order = Literal["greedy", "static"]


@dataclass(frozen=True, slots=True)
class Forecast:
    """What tables of widths are expected to cost.

    With H_i(b) the cost of unit i alone, b0 the narrowest width and I_ij what units i and j cost
    together in b0 beyond what they cost alone, a table b costs

        sum_i H_i(b_i) + sum_{i<j} I_ij r_i r_j,    r_i = sqrt(H_i(b_i) / H_i(b0))

    for an interaction grows as both errors do.

    Attributes:
        alone: H, float64 [units, widths], narrowest first.
        pairs: I, float64 [units, units], symmetric, zeros on the diagonal.
        sizes: of a unit in a width, float64 [units, widths].
    """

    alone: Tensor
    pairs: Tensor
    sizes: Tensor

    @property
    def shares(self) -> Tensor:
        """r, float64 [units, widths]."""
        return (self.alone / self.alone[:, :1].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()

    def size(self, table: Table) -> float:
        """Return the size of all units together."""
        return float(_pick(self.sizes, table).sum())

    def cost(self, table: Table) -> float:
        """Return the cost of rounding all units."""
        shares = _pick(self.shares, table)
        return float(_pick(self.alone, table).sum() + shares @ self.pairs @ shares / 2)

    def single(self, table: Table, beside: Table | None = None) -> tuple[Tensor, Tensor]:
        """Return what giving one unit another width adds to cost and size: two [units, widths].

        Args:
            table: the widths now.
            beside: those that the other units count with; None: the same.
        """
        now = _pick(self.shares, table)
        others = now if beside is None else _pick(self.shares, beside)
        alone = self.alone - _pick(self.alone, table)[:, None]
        joint = (self.shares - now[:, None]) * (self.pairs @ others)[:, None]
        return alone + joint, self.sizes - _pick(self.sizes, table)[:, None]

    def double(self, table: Table) -> tuple[Tensor, Tensor]:
        """Return cost and size after changing two units: two [units * widths, units * widths].

        A change may be none, so single ones are among them; the cost of two changes of one unit is
        infinite.
        """
        widths = self.alone.shape[1]
        costs, sizes = (added.flatten() for added in self.single(table))
        moved = (self.shares - _pick(self.shares, table)[:, None]).flatten()
        pairs, own = (
            matrix.repeat_interleave(widths, 0).repeat_interleave(widths, 1)
            for matrix in (self.pairs, torch.eye(len(self.pairs), dtype=torch.bool))
        )
        both = costs[:, None] + costs + pairs * moved[:, None] * moved
        both = self.cost(table) + both.masked_fill(own, torch.inf)
        return both, self.size(table) + sizes[:, None] + sizes


def chain(forecast: Forecast, order: Order = "greedy") -> list[Table]:
    """Return tables from the widest to the narrowest, each with one unit narrower than the last.

    The unit that goes next adds least cost for what it saves.  Its score is ``H_i + sum of I_ij``
    per unit of size, over the units j as they are by then (greedy), or over all others as they are
    in the narrowest width (static).
    """
    units, widths = forecast.alone.shape
    beside = (0,) * units if order == "static" else None
    table: Table = (widths - 1,) * units
    found = [table]
    while any(table):
        costs, sizes = forecast.single(table, beside)
        narrower = torch.arange(widths) < torch.tensor(table)[:, None]
        price = torch.where(narrower, costs / -sizes, torch.inf)
        table = _changed(table, int(price.argmin()), widths)
        found.append(table)
    return found


def descend(forecast: Forecast, table: Table, limit: float) -> Table:
    """Change one or two units at a time, for the better, while the size stays within ``limit``."""
    while True:
        costs, sizes = forecast.double(table)
        costs = costs.masked_fill(sizes > limit, torch.inf).flatten()
        best = int(costs.argmin())
        if not float(costs[best]) < forecast.cost(table) * (1 - 1e-9):
            return table
        table = _changed_twice(table, best, forecast.alone.shape)


@dataclass(frozen=True, slots=True)
class Goal:
    """What a table must meet; one of the two.

    Attributes:
        size: at most; the cost is to be small.
        cost: at most, as measured; the size is to be small.
    """

    size: float | None = None
    cost: float | None = None

    def meets(self, size: float, cost: float) -> bool:
        """Tell whether a table is good enough."""
        if self.size is not None:
            return size <= self.size * (1 + 1e-12)
        return self.cost is not None and cost <= self.cost

    def rank(self, size: float, cost: float) -> tuple[float, float]:
        """Return what is to be small."""
        return (size, cost) if self.size is None else (cost, size)


class Search:
    """Looks for the best table that meets a goal.

    1. The chain of tables is cut by bisection where it meets the goal, against measured costs where
       the goal is a cost; costs are taken to rise along the chain.  Each table that is looked at is
       first improved by forecast, at its size.
    2. Uniform widths are measured.
    3. ``tables`` neighbours of the best table so far, by rising forecast, are measured.

    Args:
        forecast: what tables are expected to cost.
        measure: what a table does cost.
        goal: some table meets it.
        tables: how many to measure in step 3.
        order: of the chain.
    """

    def __init__(
        self,
        forecast: Forecast,
        measure: Callable[[Table], float],
        goal: Goal,
        tables: int,
        order: Order = "greedy",
    ) -> None:
        self.forecast, self.measure, self.goal = forecast, measure, goal
        self.tables, self.order = tables, order
        self.seen: dict[Table, float] = {}

    def run(self) -> Table:
        """Return the best table among those that were measured."""
        units, widths = self.forecast.alone.shape
        self._cut(chain(self.forecast, self.order))
        for width in range(widths):
            self.look((width,) * units)
        for _ in range(self.tables):
            table = self._neighbour(self.best())
            if table is None:
                break
            self.look(table)
        return self.best()

    def look(self, table: Table) -> bool:
        """Measure a table; tell whether it meets the goal."""
        size = self.forecast.size(table)
        if self.goal.size is not None and not self.goal.meets(size, 0.0):
            return False
        if table not in self.seen:
            self.seen[table] = self.measure(table)
        return self.goal.meets(size, self.seen[table])

    def best(self) -> Table:
        """Return the best table so far."""
        known = [(self.forecast.size(table), cost, table) for table, cost in self.seen.items()]
        good = [one for one in known if self.goal.meets(*one[:2])]
        return min(good, key=lambda one: (self.goal.rank(*one[:2]), one[2]))[2]

    def _cut(self, tables: list[Table]) -> None:
        """Look for the smallest table of the chain that meets a cost, or the largest for a size."""
        low, high = 0, len(tables) - 1  # ends that meet a cost, and a size
        if self.goal.cost is not None:
            while low < high:
                middle = (low + high + 1) // 2
                if self.look(self._improved(tables[middle], self.forecast.size(tables[middle]))):
                    low = middle
                else:
                    high = middle - 1
            self.look(tables[0])
            return
        assert self.goal.size is not None
        while low < high:
            middle = (low + high) // 2
            if self.goal.meets(self.forecast.size(tables[middle]), 0.0):
                high = middle
            else:
                low = middle + 1
        self.look(self._improved(tables[low], self.goal.size))

    def _improved(self, table: Table, limit: float) -> Table:
        return descend(self.forecast, table, limit * (1 + 1e-12))

    def _neighbour(self, table: Table) -> Table | None:
        """Return the table not seen yet, one or two changes away, that is expected to be best."""
        costs, sizes = self.forecast.double(table)
        small = sizes <= self.goal.size * (1 + 1e-12) if self.goal.size is not None else (
            sizes < self.forecast.size(table)
        )  # fmt: skip
        order = costs.masked_fill(~small, torch.inf).flatten().sort(stable=True)
        for value, index in zip(order.values.tolist(), order.indices.tolist(), strict=True):
            if math.isinf(value):
                return None
            found = _changed_twice(table, index, self.forecast.alone.shape)
            if found not in self.seen:
                return found
        return None


def _pick(values: Tensor, table: Table) -> Tensor:
    """Return one number of each row: [units, widths] to [units]."""
    return values.gather(1, torch.tensor(table)[:, None])[:, 0]


def _changed(table: Table, change: int, widths: int) -> Table:
    """Return a table with one unit changed; ``change`` is its number in [units, widths]."""
    unit, width = divmod(change, widths)
    return (*table[:unit], width, *table[unit + 1 :])


def _changed_twice(table: Table, change: int, shape: Sequence[int]) -> Table:
    """Return a table with two units changed; ``change`` is a number in ``Forecast.double``."""
    units, widths = shape
    first, second = divmod(change, units * widths)
    return _changed(_changed(table, first, widths), second, widths)
