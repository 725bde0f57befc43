"""GPTQ and QuantEase against their plain forms, and what the algebra promises."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modelathe.ir.quant import QuantType, choose_grid
from modelathe.passes.quantization.sweeps import (
    Columns,
    damped,
    error,
    gptq,
    quantease,
    refit,
    sweep,
)

OUT, IN = 12, 72  # more columns than are corrected one by one, and no power of two


def problem(seed: int = 0, bits: int = 3, group: int = -1) -> tuple[Tensor, Tensor, Columns]:
    """Return a weight [in, out], moments of inputs that depend on each other, and a grid."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(IN, OUT, generator=generator, dtype=torch.float64)
    inputs = torch.randn(IN, 3 * IN, generator=generator, dtype=torch.float64)
    mixed = inputs + torch.randn(IN, IN, generator=generator, dtype=torch.float64) @ inputs / 4
    moments = mixed @ mixed.T / inputs.shape[1]
    grid = choose_grid(weight.T, QuantType(bits, group, symmetric=False))
    return weight, moments, Columns.of(grid, torch.arange(IN), torch.float64)


def plain_gptq(weight: Tensor, moments: Tensor, columns: Columns) -> Tensor:
    """Round column after column, as the paper writes it: with the inverse of the moments."""
    factor = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
    left, found = weight.clone(), torch.empty_like(weight)
    for j in range(IN):
        found[j] = columns.nearest(j, left[j])
        left[j:] -= torch.outer(factor[j, j:], (left[j] - found[j]) / factor[j, j])
    return found


def plain_quantease(weight: Tensor, moments: Tensor, columns: Columns, sweeps: int) -> Tensor:
    """Move one column after the other to the grid's nearest point to the closed-form minimum."""
    found = weight.clone()
    for _ in range(sweeps):
        for j in range(IN):
            gradient = (weight - found).T @ moments[:, j]
            found[j] = columns.nearest(j, found[j] + gradient / moments[j, j])
    return found


@pytest.mark.parametrize("group", [-1, 24])
def test_gptq_is_the_published_recursion(group: int) -> None:
    weight, moments, columns = problem(group=group)
    assert gptq(weight, moments, columns.nearest).equal(plain_gptq(weight, moments, columns))


@pytest.mark.parametrize("sweeps", [1, 4])
def test_quantease_by_halves_is_the_plain_loop(sweeps: int) -> None:
    weight, moments, columns = problem()
    found = quantease(weight, moments, weight, columns.nearest, sweeps, relax=False)
    assert found.equal(plain_quantease(weight, moments, columns, sweeps))


def test_rounded_sweeps_never_raise_the_error_and_end_where_nothing_moves() -> None:
    weight, moments, columns = problem()
    found = quantease(weight, moments, weight, columns.nearest, 1, relax=False)
    errors = [error(weight, found, moments)]
    for _ in range(60):
        found = quantease(weight, moments, found, columns.nearest, 1, relax=False)
        errors.append(error(weight, found, moments))
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]
    again = quantease(weight, moments, found, columns.nearest, 1, relax=False)
    assert again.equal(found)
    assert plain_quantease_step(weight, moments, found, columns).equal(found)


def plain_quantease_step(weight: Tensor, moments: Tensor, at: Tensor, columns: Columns) -> Tensor:
    """Return each column's best value given all others as they are."""
    best = at + (moments @ (weight - at)) / moments.diagonal()[:, None]
    return torch.stack([columns.nearest(j, best[j]) for j in range(IN)])


def test_each_method_is_better_than_the_one_before_it() -> None:
    totals = [0.0] * 4
    for seed in range(8):
        weight, moments, columns = problem(seed)
        nearest = torch.stack([columns.nearest(j, weight[j]) for j in range(IN)])
        one_pass = gptq(weight, moments, columns.nearest)
        descent = quantease(weight, moments, one_pass, columns.nearest, 10, relax=False)
        relaxed = quantease(weight, moments, weight, columns.nearest, 30, relax=True)
        found = [nearest, one_pass, descent, relaxed]
        totals = [t + error(weight, f, moments) for t, f in zip(totals, found, strict=True)]
        assert error(weight, descent, moments) <= error(weight, one_pass, moments)
    assert totals[1] < 0.8 * totals[0]
    assert totals[2] < 0.95 * totals[1]
    assert totals[3] < totals[1]


Method = Callable[[Tensor, Tensor, Columns], Tensor]


def _gptq(weight: Tensor, moments: Tensor, columns: Columns) -> Tensor:
    return gptq(weight, moments, columns.nearest)


def _quantease(weight: Tensor, moments: Tensor, columns: Columns) -> Tensor:
    return quantease(weight, moments, weight, columns.nearest, 5, relax=True)


@pytest.mark.parametrize("method", [_gptq, _quantease])
def test_rows_do_not_meet(method: Method) -> None:
    weight, moments, columns = problem()
    whole = method(weight, moments, columns)
    rows = slice(3, 7)
    part = Columns(columns.qtype, columns.scales[:, rows], columns.zeros[:, rows], columns.group_of)
    # products of other shapes sum in another order, and the values are those of one grid
    found = method(weight[:, rows].contiguous(), moments, part)
    torch.testing.assert_close(found, whole[:, rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [_gptq, _quantease])
def test_what_reads_nothing_is_rounded_to_nearest(method: Method) -> None:
    weight, moments, columns = problem()
    moments[5], moments[:, 5] = 0, 0
    found = method(weight, damped(moments, 0.0), columns)
    assert found[5].equal(columns.nearest(5, weight[5]))
    nothing = method(weight, damped(torch.zeros_like(moments), 0.01), columns)
    assert nothing.equal(torch.stack([columns.nearest(j, weight[j]) for j in range(IN)]))


def test_independent_inputs_leave_nothing_to_correct() -> None:
    weight, moments, columns = problem()
    diagonal = torch.diag(moments.diagonal())
    nearest = torch.stack([columns.nearest(j, weight[j]) for j in range(IN)])
    assert gptq(weight, diagonal, columns.nearest).equal(nearest)
    assert quantease(weight, diagonal, weight, columns.nearest, 3, relax=True).equal(nearest)


def test_a_group_is_corrected_as_a_whole_before_its_first_column() -> None:
    weight, moments, _ = problem()
    lower = moments / moments.diagonal()[:, None]
    seen: list[tuple[int, Tensor]] = []
    decided = sweep(
        weight.clone(),
        weight,
        lower,
        lambda j, u: u.round(),
        group=24,
        begin=lambda j, run: seen.append((j, run.clone())),
    )
    assert [j for j, _ in seen] == [0, 24, 48]
    for j, run in seen:
        wanted = weight[j : j + 24] + lower[j : j + 24, :j] @ (weight - decided)[:j]
        torch.testing.assert_close(run, wanted, rtol=1e-12, atol=1e-12)


def test_moments_that_are_not_positive_definite_are_refused() -> None:
    weight, moments, columns = problem()
    moments[0] = moments[1]
    moments[:, 0] = -moments[:, 1]
    with pytest.raises(ValueError, match="not positive definite"):
        gptq(weight, moments, columns.nearest)


def test_damping_adds_a_share_of_the_mean_power() -> None:
    moments = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[4.2, 1.0, 0.0], [1.0, 2.2, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(damped(moments, 0.1), expected)
    assert moments[0, 0] == 4  # a copy


def test_refitted_scales_are_those_of_least_squares() -> None:
    weight, moments, columns = problem(group=24)
    nearest = torch.stack([columns.nearest(j, weight[j]) for j in range(IN)])
    levels = columns.levels(nearest)
    scales = refit(weight, levels, columns.scales, moments, sweeps=200)
    for row in range(OUT):
        basis = torch.zeros(IN, 3, dtype=torch.float64)
        for group in range(3):
            part = slice(24 * group, 24 * (group + 1))
            basis[part, group] = levels[part, row]
        normal = basis.T @ moments @ basis
        best = torch.linalg.solve(normal, basis.T @ moments @ weight[:, row])
        torch.testing.assert_close(scales[:, row], best, rtol=1e-8, atol=1e-10)


def test_refitting_never_raises_the_error() -> None:
    weight, moments, columns = problem(group=24)
    found = gptq(weight, moments, columns.nearest)
    levels = columns.levels(found)
    scales = refit(weight, levels, columns.scales, moments, sweeps=1)
    better = levels * scales.repeat_interleave(24, 0)
    assert error(weight, better, moments) < error(weight, found, moments)


def test_a_group_of_zeros_keeps_its_scale() -> None:
    weight, moments, columns = problem(group=24)
    levels = torch.zeros_like(weight)
    assert refit(weight, levels, columns.scales, moments, sweeps=2).equal(columns.scales)
