from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelathe.passes.cache.pareto import lower_hull, pareto_front

figures = st.integers(0, 6).map(float)


@given(st.lists(st.tuples(figures, figures), min_size=1, max_size=12))
def test_the_front_is_exactly_what_no_other_point_dominates(
    points: list[tuple[float, float]],
) -> None:
    def dominated(point: tuple[float, float]) -> bool:
        return any(o[0] <= point[0] and o[1] <= point[1] and o != point for o in points)

    front = pareto_front(*zip(*points, strict=True))
    assert set(front) == {i for i, point in enumerate(points) if not dominated(point)}
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_equal_points_are_both_on_the_front() -> None:
    assert pareto_front([1.0, 2.0, 1.0, 2.0], [3.0, 1.0, 3.0, 2.0]) == (0, 2, 1)


@pytest.mark.parametrize("seed", range(4))
def test_no_sum_of_choices_lies_below_the_hull(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([[8.0, 6.0, 4.0], [8.0, 5.0, torch.inf], [16.0, 8.0, 4.0]]).double()
    errors = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    errors = errors.sort(dim=1).values  # a smaller size costs more

    def totals(choice: tuple[int, ...]) -> tuple[float, float]:
        rows = torch.arange(3)
        return float(sizes[rows, list(choice)].sum()), float(errors[rows, list(choice)].sum())

    options = [range(3), range(2), range(3)]
    everything = [totals(choice) for choice in itertools.product(*options)]
    hull = lower_hull(sizes, errors)
    assert {totals(hull[0])[0], totals(hull[-1])[0]} == {32.0, 13.0}
    ends = [totals(choice) for choice in hull]
    for (right, low), (left, high) in itertools.pairwise(ends):
        assert right > left
        for size, error in everything:
            if left <= size <= right:
                line = low + (high - low) * (right - size) / (right - left)
                assert error >= line - 1e-12
