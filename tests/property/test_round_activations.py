"""Rounding activations moves no number by more than half a step, whatever the numbers are."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelathe.ir.activations import dynamic_step, largest_code, round_activations

finite = st.floats(-1e4, 1e4, width=16) | st.just(0.0)
rows = st.integers(1, 6).flatmap(
    lambda width: st.lists(st.lists(finite, min_size=width, max_size=width), min_size=1, max_size=4)
)
widths = st.sampled_from([7, 8])


@given(rows, widths)
@settings(deadline=None)
def test_dynamic(values: list[list[float]], bits: int) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    gap = (round_activations(x, None, None, bits) - x).abs()
    assert (gap <= dynamic_step(x, bits) * (0.5 + 1e-12)).all()


@given(rows, widths, st.floats(1e-3, 1e3), st.integers(0, 127))
@settings(deadline=None)
def test_static(values: list[list[float]], bits: int, scale: float, zero: int) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    step = torch.tensor(scale, dtype=torch.float64)
    found = round_activations(x, step, torch.tensor(zero, dtype=torch.uint8), bits)
    low, high = -zero * scale, (largest_code(bits) - zero) * scale
    assert ((found - x.clamp(low, high)).abs() <= step * (0.5 + 1e-9)).all()
