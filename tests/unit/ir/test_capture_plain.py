"""Modules of the user's own: what they may return, and what sizes they may need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import CaptureError, capture, verify


class Returns(nn.Module):
    """Returns what ``pick`` makes of its input's double."""

    def __init__(self, pick: Any) -> None:
        super().__init__()
        self.pick = pick

    def forward(self, x: Tensor) -> Any:
        return self.pick(x * 2)


@pytest.mark.parametrize(
    ("pick", "names"),
    [
        (lambda y: (y, None), ("output",)),
        (lambda y: (y, None, {"more": y + 1}), ("output_0", "output_2")),
    ],
)
def test_an_output_that_is_none_is_left_out(pick: Any, names: tuple[str, ...]) -> None:
    found = capture(Returns(pick).eval(), (torch.ones(2, 3),))
    verify(found)
    values = [torch.full((2, 3), 2.0), torch.full((2, 3), 3.0)]
    made = found.run({"x": torch.ones(2, 3)})
    assert tuple(made) == names
    assert all(torch.equal(a, b) for a, b in zip(made.values(), values, strict=False))


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        (lambda y: (y, 3), r"output 1 is no tensor"),
        (lambda y: (y.shape[0], y), r"output 0 is no tensor"),
        (lambda y: None, r"returns no tensor"),
    ],
)
def test_other_outputs_that_are_no_tensors_are_refused(pick: Any, message: str) -> None:
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    with pytest.raises(CaptureError, match=message) as caught:
        capture(Returns(pick).eval(), (torch.ones(2, 3),), shapes)
    assert caught.value.remedy
