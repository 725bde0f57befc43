"""What float16 has no number for is an error that names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import PassError, Program, capture, converted
from modelathe.passes import ConvertDtype


def convert(found: Program, to: Any) -> Program:
    return ConvertDtype(to=to)(found).program


class Product(nn.Module):
    """``x @ w.T * s``, all far from 1."""

    def __init__(self, weight: float = 1.0, scale: float = 1.0) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)
        self.scale = nn.Parameter(torch.tensor(scale))
        nn.init.constant_(self.inner.weight, weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x) * self.scale) * self.inner(x) * self.inner(x)


def product(**options: float) -> Program:
    return capture(Product(**options).eval(), (torch.ones(2, 4),))


def test_a_weight_that_float16_has_no_number_for_is_named() -> None:
    found = product(weight=70000.0)
    with pytest.raises(PassError, match=r"@inner\.weight: holds 7e\+04, more than") as caught:
        convert(found, "float16")
    assert "bfloat16" in caught.value.remedy
    convert(found, "bfloat16")
    # lazily: nobody is told before somebody reads the bytes
    with pytest.raises(PassError, match=r"@inner\.weight"):
        converted(found, torch.float16).run({"x": torch.ones(2, 4, dtype=torch.float16)})


def test_a_number_on_its_own_is_cut_to_the_range() -> None:
    found = convert(product(scale=-3.4e38), "float16")
    assert found.weights["scale.float16"].load() == -65504


def test_a_value_that_overflows_is_named() -> None:
    with pytest.raises(PassError, match=r"output output overflows .*first infinite at %mul_2 "):
        convert(product(weight=500.0), "float16")
    convert(product(weight=500.0), "bfloat16")
