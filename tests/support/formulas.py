"""Formulas spelled out by hand, as they are captured and as ``canonicalize`` leaves them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from modelathe.ir import Program, capture
from modelathe.passes import Canonicalize
from support.feeds import feed
from support.models import perturb
from support.numeric import EXACT, rounding, worst_error


class Formula(nn.Module):
    """A function of an input ``[2, 3, 8]`` and a few weights."""

    def __init__(self, function: Callable[[Formula, Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.function = function
        self.gain, self.shift = (nn.Parameter(torch.ones(8)) for _ in range(2))
        self.matrix, self.scalar = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(1))
        perturb(self, seed=2)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def made(
    function: Callable[[Formula, Tensor], Tensor], dtype: torch.dtype = torch.float32
) -> tuple[Program, Program]:
    """Return a formula as it is captured, and as it is after the pass; checked to be equal."""
    model = Formula(function, dtype).eval()
    before = capture(model, (torch.ones(2, 3, 8, dtype=dtype),))
    after = Canonicalize()(before).program
    inputs = feed(before)
    wide = [each.run(inputs, dtype=torch.float64) for each in (after, before)]
    assert worst_error(*wide) <= EXACT
    assert worst_error(after.run(inputs), before.run(inputs)) <= rounding(dtype)
    return before, after


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def cohere(x: Tensor) -> Tensor:
    """Centre twice, as Cohere does."""
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5)
