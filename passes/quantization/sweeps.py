"""Rounding a weight so that what it computes changes least: GPTQ and QuantEase.

Both minimise ``tr((W - V) S (W - V)^T)`` over V on a grid, with W: [out, in] the weight and
S = X X^T: [in, in] the second moments of what it reads, and both go through the columns one by one:
a column is rounded after what the columns before it got wrong has been added to it,

    u_j = target_j + sum over i < j of L_ji (base_i - v_i),     v_j = round(u_j)

with a lower triangular L.  Only target, base and L differ (see ``gptq`` and ``quantease``).  Rows
do not meet.  Matrices are held transposed, [in, out]: a column is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.quant import Grid, QuantType, choose_grid

_LEAF = 16  # columns that correct each other one by one; more are corrected by matrix products

Decide = Callable[[int, Tensor], Tensor]
"""From a column's number and its corrected value [out] to what is put there."""
Begin = Callable[[int, Tensor], None]
"""Told the number of a run's first column, and the run's corrected columns [columns, out]."""


def sweep(
    target: Tensor,
    base: Tensor,
    lower: Tensor,
    decide: Decide,
    group: int = 1,
    begin: Begin | None = None,
) -> Tensor:
    """Visit every column once and return what was decided: [in, out].

    By halves: the first half is decided, one matrix product corrects the second half, and each half
    is done in the same way.  The corrections are those of the plain loop.

    Args:
        target: [in, out]; corrected in place.
        base: [in, out].
        lower: [in, in]; row j holds what column j takes of the columns before it.
        decide: gives the value of a column.
        group: a run of so many columns is corrected as a whole before its first one is decided.
        begin: called at the first column of each run, before it is decided.
    """
    moved = torch.empty_like(target)  # base - decided, of the columns that are decided
    decided = torch.empty_like(target)
    leaf = _LEAF if begin is None else min(_LEAF, group)

    def halve(low: int, high: int) -> None:
        if high - low > leaf:
            middle = (low + high) // 2
            if high - low > group:  # between runs, never inside one
                middle = low + (high - low) // group // 2 * group
            halve(low, middle)
            target[middle:high].addmm_(lower[middle:high, low:middle], moved[low:middle])
            halve(middle, high)
            return
        for j in range(low, high):
            if begin is not None and j % group == 0:
                begin(j, target[j : j + group])
            if j > low:
                target[j].addmv_(moved[low:j].T, lower[j, low:j])
            decided[j] = decide(j, target[j])
            torch.sub(base[j], decided[j], out=moved[j])

    halve(0, len(target))
    return decided


@dataclass(slots=True)
class Columns:
    """A grid, column by column.

    Attributes:
        qtype: the number type.
        scales: [groups, out], as stored.
        zeros: codes of zero, [groups, out].
        group_of: which group the column that is visited first, second, ... is in.
    """

    qtype: QuantType
    scales: Tensor
    zeros: Tensor
    group_of: list[int]

    @classmethod
    def of(cls, grid: Grid, order: Tensor, dtype: torch.dtype) -> Columns:
        """Return the columns of a grid in the order in which they are visited.

        Args:
            grid: of the weight, columns in their own order.
            order: [in], the column that is visited first, second, ...
            dtype: to compute in.
        """
        out, groups = grid.scales.shape
        size = len(order) // groups
        zeros = grid.zero_points(dtype)
        wide = (
            torch.full((groups, out), zeros, dtype=dtype, device=grid.scales.device)
            if isinstance(zeros, float)
            else zeros.squeeze(-1).T.contiguous()
        )
        of = (order // size).tolist()
        return cls(grid.qtype, grid.scales.to(dtype).T.contiguous(), wide, of)

    def nearest(self, j: int, u: Tensor) -> Tensor:
        """Return the numbers of the grid that are nearest to a column: [out]."""
        group = self.group_of[j]
        scale, zero = self.scales[group], self.zeros[group]
        steps = (u / scale).round_().add_(zero).clamp_(0, self.qtype.largest_code)
        return steps.sub_(zero).mul_(scale)

    def wide(self) -> Tensor:
        """Return the scale of every number: [in, out], columns in the order they are visited."""
        return self.scales[torch.tensor(self.group_of, device=self.scales.device)]

    def levels(self, values: Tensor) -> Tensor:
        """Return the whole numbers that numbers of the grid are multiples of: [in, out]."""
        return (values / self.wide()).round_()

    def cover(self, group: int, columns: Tensor, dtype: torch.dtype) -> None:
        """Let a group's grid be the one that covers ``columns`` [size, out].

        Args:
            group: which one.
            columns: what it must cover.
            dtype: the dtype in which scales are stored.
        """
        row = QuantType(self.qtype.bits, -1, self.qtype.symmetric)
        grid = choose_grid(columns.T.to(dtype), row)
        self.scales[group] = grid.scales[:, 0]
        if grid.zeros is not None:
            self.zeros[group] = grid.zeros[:, 0].to(self.zeros.dtype)

    def grid(self, dtype: torch.dtype) -> Grid:
        """Return the grid of the weight, scales in the dtype they are stored in."""
        zeros = None if self.qtype.symmetric else self.zeros.T.to(torch.uint8).contiguous()
        return Grid(self.qtype, self.scales.T.to(dtype).contiguous(), zeros)


def damped(moments: Tensor, damping: float) -> Tensor:
    """Return second moments with ``damping`` times their mean diagonal added to it.

    A column that is always zero gets 1 there: it is rounded, and corrects nothing.

    Args:
        moments: [in, in].
        damping: share of the mean diagonal, at least 0.
    """
    result = moments.clone()
    diagonal = result.diagonal()
    dead = diagonal <= 0
    diagonal += damping * diagonal.mean()
    diagonal[dead] = 1.0
    return result


def gptq(
    weight: Tensor,
    moments: Tensor,
    decide: Decide,
    group: int = 1,
    begin: Begin | None = None,
) -> Tensor:
    """Return a weight rounded column by column, each correcting the ones behind it.

    With ``S = R R^T``, R upper triangular: the error ``tr(E S E^T) = |E R|^2`` of the columns up to
    j is least where ``E_j = -sum over i < j of E_i R_ij / R_jj``, which is what remains to be
    corrected.  That is GPTQ (arXiv 2210.17323), whose update is written with the Cholesky factor of
    the *inverse*; this one needs no inverse.

    Args:
        weight: [in, out], columns in the order in which they are visited.
        moments: [in, in], positive definite: see ``damped``.
        decide: rounds a column.
        group: as in ``sweep``.
        begin: as in ``sweep``.

    Raises:
        ValueError: the moments are not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(moments.flip(0, 1))
    if int(failed):
        raise ValueError("the second moments of what it reads are not positive definite")
    lower = factor.flip(0, 1).T  # R^T
    lower = lower / lower.diagonal()[:, None]
    return sweep(weight.clone(), weight, lower, decide, group, begin)


def quantease(
    weight: Tensor,
    moments: Tensor,
    start: Tensor,
    decide: Decide,
    iterations: int,
    relax: bool,
) -> Tensor:
    """Return a weight rounded by cyclic coordinate descent.

    Each column in turn becomes the grid's nearest numbers to its least-squares solution given all
    others, ``v_j + ((W - V) S)_j / S_jj``.  One product gives that for all columns at the start of
    a sweep, and the columns that changed since correct it.  A sweep of rounded columns after
    another never raises the error.

    Args:
        weight: [in, out], columns in the order in which they are visited.
        moments: [in, in]; no entry of the diagonal is 0: see ``damped``.
        start: [in, out], where to begin.
        decide: rounds a column.
        iterations: sweeps, at least 1.
        relax: leave the second of every three sweeps unrounded, up to the 26th, but for the last.

    Source: arXiv 2309.01885, Algorithm 2; which sweeps are relaxed is that of its release.
    """
    diagonal = moments.diagonal()[:, None]
    lower = moments / diagonal
    found = start
    for turn in range(iterations):
        relaxed = relax and turn % 3 == 1 and turn <= 25 and turn < iterations - 1
        target = torch.addmm(found, lower, weight - found)
        found = sweep(target, found, lower, _keep if relaxed else decide)
    return found


def _keep(_: int, u: Tensor) -> Tensor:
    return u


def error(weight: Tensor, rounded: Tensor, moments: Tensor) -> float:
    """Return ``tr((W - V) S (W - V)^T)``.

    Args:
        weight: W, [in, out].
        rounded: V, [in, out].
        moments: S, [in, in].
    """
    difference = weight - rounded
    return float((difference * (moments @ difference)).sum(dtype=torch.float64))


def refit(weight: Tensor, levels: Tensor, scales: Tensor, moments: Tensor, sweeps: int) -> Tensor:
    """Return the scales with which a weight's codes give the least error: [groups, out].

    One group after the other takes its best scale given the others',
    ``s_g + l_g . (S (W - V))_g / (l_g . S_gg l_g)``, l_g its whole numbers.

    Args:
        weight: [in, out], columns in their own order.
        levels: whole numbers, code - zero, [in, out].
        scales: [groups, out], to begin with.
        moments: [in, in].
        sweeps: over the groups.
    """
    groups = len(scales)
    size = len(weight) // groups
    scales = scales.clone()
    wide = scales.repeat_interleave(size, 0)
    for _ in range(sweeps if groups > 1 else 1):
        residual = moments @ (weight - levels * wide)
        for group in range(groups):
            part = slice(group * size, (group + 1) * size)
            own = levels[part]
            curvature = (own * (moments[part, part] @ own)).sum(0)
            step = (own * residual[part]).sum(0) / curvature.clamp_min(1e-30)
            step = torch.where(curvature > 0, step, 0.0)
            scales[group] += step
            if groups > 1:
                residual.sub_(moments[:, part] @ (own * step))
        wide = scales.repeat_interleave(size, 0)
    return scales
