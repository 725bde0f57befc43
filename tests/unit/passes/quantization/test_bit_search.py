"""The search among tables of widths, on costs that are made up."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from modelathe.passes.quantization.bit_search import Forecast, Goal, Search, Table, chain, descend

BITS = torch.tensor([2.0, 3.0, 4.0, 8.0], dtype=torch.float64)


def made(units: int, seed: int = 0, *, alone: bool = False) -> Forecast:
    """Return units of different sizes and costs, with interactions unless ``alone``."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(units, 1, generator=generator, dtype=torch.float64) + 0.05
    noise = torch.rand(units, 4, generator=generator, dtype=torch.float64) * 0.3 + 0.85
    costs = first**3 * 4.0 ** (2 - BITS) * noise
    matrix = torch.rand(units, units, generator=generator, dtype=torch.float64) - 0.3
    pairs = (matrix + matrix.T).fill_diagonal_(0) * 0.1 * (first * first.T) ** 1.5
    numbers = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64).repeat(units, 1)[:units]
    return Forecast(costs, pairs * (not alone), numbers * BITS)


def every(units: int) -> list[Table]:
    return list(itertools.product(range(4), repeat=units))


def by_hand(forecast: Forecast, table: Table) -> float:
    """Return the forecast, term by term."""
    alone = [float(forecast.alone[unit, index]) for unit, index in enumerate(table)]
    total = sum(alone)
    for i, j in itertools.combinations(range(len(table)), 2):
        shares = [(alone[k] / float(forecast.alone[k, 0])) ** 0.5 for k in (i, j)]
        total += float(forecast.pairs[i, j]) * shares[0] * shares[1]
    return total


def test_a_forecast_is_the_sum_of_its_terms() -> None:
    forecast = made(3)
    for table in every(3):
        assert forecast.cost(table) == pytest.approx(by_hand(forecast, table))
    assert forecast.cost((0, 0, 0)) == pytest.approx(
        float(forecast.alone[:, 0].sum() + forecast.pairs.sum() / 2)
    )


def test_changes_cost_what_the_changed_tables_do() -> None:
    forecast, table = made(3), (1, 3, 0)
    costs, sizes = forecast.double(table)
    for first, second in itertools.product(range(12), repeat=2):
        found = list(table)
        found[first // 4], found[second // 4] = first % 4, second % 4
        if first // 4 == second // 4:
            assert float(costs[first, second]) == float("inf")
            continue
        assert float(costs[first, second]) == pytest.approx(forecast.cost(tuple(found)))
        assert float(sizes[first, second]) == pytest.approx(forecast.size(tuple(found)))


def test_the_chain_is_nested_from_the_widest_to_the_narrowest() -> None:
    tables = chain(made(5))
    assert tables[0] == (3,) * 5
    assert tables[-1] == (0,) * 5
    for before, after in itertools.pairwise(tables):
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
        assert sum(after) < sum(before)


def test_a_static_chain_goes_by_row_sums_and_a_greedy_one_by_what_went_before() -> None:
    alone = torch.tensor([[1.0, 0], [2.0, 0], [3.0, 0]], dtype=torch.float64)
    pairs = torch.tensor([[0.0, 1.5, 5.0], [1.5, 0.0, 0.0], [5.0, 0.0, 0.0]], dtype=torch.float64)
    forecast = Forecast(alone, pairs, torch.tensor([[1.0, 2.0]] * 3, dtype=torch.float64))
    # row sums: 1 + 6.5, 2 + 1.5 and 3 + 5; by what went before: 1 first, then 2 + 1.5, then 3 + 5
    assert chain(forecast, "static") == [(1, 1, 1), (1, 0, 1), (0, 0, 1), (0, 0, 0)]
    assert chain(forecast, "greedy") == [(1, 1, 1), (0, 1, 1), (0, 0, 1), (0, 0, 0)]


@pytest.mark.parametrize("seed", range(3))
def test_without_interactions_both_chains_are_the_same(seed: int) -> None:
    forecast = made(5, seed, alone=True)
    assert chain(forecast, "static") == chain(forecast, "greedy")


def test_without_interactions_the_chain_is_ordered_by_cost_alone() -> None:
    forecast = Forecast(
        torch.tensor([[3.0, 0], [1.0, 0], [2.0, 0]], dtype=torch.float64),
        torch.zeros(3, 3, dtype=torch.float64),
        torch.tensor([[4.0, 8.0]] * 3, dtype=torch.float64),
    )
    assert chain(forecast) == [(1, 1, 1), (1, 0, 1), (1, 0, 0), (0, 0, 0)]
    pairs = torch.zeros(3, 3, dtype=torch.float64)
    pairs[1, 2] = pairs[2, 1] = 5
    shares = torch.tensor([[3.0, 1e-9], [1.0, 1e-9], [2.0, 1e-9]], dtype=torch.float64)
    assert chain(Forecast(shares, pairs, forecast.sizes))[2] == (0, 0, 1)


@pytest.mark.parametrize("seed", range(4))
def test_the_best_table_of_a_size_is_found(seed: int) -> None:
    forecast = made(4, seed)
    limit = float(forecast.sizes[:, 1].sum())
    fits = [table for table in every(4) if forecast.size(table) <= limit]
    best = min(fits, key=forecast.cost)
    found = Search(forecast, forecast.cost, Goal(size=limit), 12).run()
    assert forecast.size(found) <= limit
    assert forecast.cost(found) == pytest.approx(forecast.cost(best))
    improved = descend(forecast, (1,) * 4, limit)
    assert forecast.cost(improved) <= forecast.cost((1,) * 4)


def unlike(forecast: Forecast) -> Callable[[Table], float]:
    """Return measured costs that the forecast does not know: more for odd tables."""
    return lambda table: forecast.cost(table) * (1.3 if sum(table) % 2 else 1.0)


def test_what_was_measured_decides_and_uniform_widths_are_never_better() -> None:
    forecast = made(5)
    measure = unlike(forecast)
    limit = float(forecast.sizes[:, 2].sum())
    search = Search(forecast, measure, Goal(size=limit), 20)
    found = search.run()
    assert search.seen[found] == min(search.seen.values())
    assert search.seen[found] <= measure((2,) * 5)
    assert max(map(forecast.size, search.seen)) <= limit
    assert len(search.seen) <= 20 + 1 + 4


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_cost_is_met_with_few_measurements(share: float) -> None:
    forecast = made(5)
    measure = unlike(forecast)
    target = share * measure((0,) * 5)
    search = Search(forecast, measure, Goal(cost=target), 8)
    found = search.run()
    assert measure(found) <= target
    assert len(search.seen) <= 8 + 4 + 5  # near the best, uniform widths, log2 of the chain
    uniform = [t for t in ((i,) * 5 for i in range(4)) if measure(t) <= target]
    assert forecast.size(found) <= min(map(forecast.size, uniform))


def test_a_search_ends_when_nothing_is_left() -> None:
    forecast = made(1)
    search = Search(forecast, forecast.cost, Goal(size=float(forecast.sizes[0, 3])), 99)
    assert search.run() == (3,)
    assert len(search.seen) == 4
