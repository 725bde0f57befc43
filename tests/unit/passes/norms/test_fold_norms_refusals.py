"""Norms that keep their parameters, each with its reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import Program
from modelathe.passes import Canonicalize, FoldNorms, QuantizeWeights
from support.models import program
from support.small import captured

F = nn.functional


class Columns(nn.Module):
    """The linear reads some columns of the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(x)[..., :4])
        return result


class Halves(Columns):
    """The linear reads the norm cut into rows of half the width."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(x).reshape(-1, 4))
        return result


class Wide(nn.Module):
    """A norm over two dimensions, read by a linear over one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm([8, 8]), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(x))
        return result


class ComputedWeightOfLinear(nn.Module):
    """The linear's weight is made from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), x * 2)


class ComputedGain(nn.Module):
    """The norm's gain is made from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(F.layer_norm(x, [8], x[0], None))
        return result


class BiasToo(nn.Module):
    """A linear that reads the norm as its input and as its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.weight = nn.LayerNorm(8), nn.Parameter(torch.zeros(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x[0])
        return F.linear(y, self.weight, y)


class Returned(nn.Module):
    """The norm is an output, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        return y, self.head(y)


REFUSED: dict[str, tuple[Callable[[], Program], str]] = {
    "read by a sum": (
        lambda: program("post-norm"),
        "missed: layer_norm: also read by %add (aten.add.Tensor)",
    ),
    "read as a weight": (
        lambda: program("norm-as-weight"),
        "missed: layer_norm: read by %linear (aten.linear)",
    ),
    "tied head": (
        lambda: program("tied-head"),
        "missed: layer_norm: head is tied; untie=true to force",
    ),
    "columns": (
        lambda: captured(Columns),
        "missed: layer_norm: read by %slice_1 (aten.slice.Tensor)",
    ),
    "halves": (lambda: captured(Halves), "missed: layer_norm: read by"),
    "two dimensions": (
        lambda: captured(Wide, 2, 8, 8),
        "missed: layer_norm: normalises over 2 dimensions, and a linear reads one",
    ),
    "weight from activations": (
        lambda: captured(ComputedWeightOfLinear),
        "missed: layer_norm: read by %linear (aten.linear)",
    ),
    "gain from activations": (
        lambda: captured(ComputedGain),
        "missed: layer_norm: its gain or bias is computed from activations",
    ),
    "input and bias": (
        lambda: captured(BiasToo),
        "missed: layer_norm: read by %linear (aten.linear)",
    ),
    "an output": (lambda: captured(Returned), "missed: layer_norm: an output of the graph"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_norm_that_cannot_be_folded_says_why(case: str) -> None:
    build, message = REFUSED[case]
    before = Canonicalize()(build()).program
    result = FoldNorms()(before)
    (remark,) = result.remarks
    assert str(remark).startswith(message)
    assert not result.modified


class Mixed(nn.Module):
    """A weight behind a norm that may be folded, and behind one that may not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x + 1)
        result: Tensor = self.up(self.norm(x)) + self.up(y) + y
        return result


def test_one_refusal_costs_the_norms_that_share_its_weights() -> None:
    result = FoldNorms()(captured(Mixed))
    assert {remark.kind for remark in result.remarks} == {"missed"}
    assert len(result.remarks) == 2


def test_a_quantised_reader_keeps_its_grid() -> None:
    quantised = QuantizeWeights(group_size=8)(program("norm-linears")).program
    (remark,) = FoldNorms()(quantised).remarks
    assert remark.kind == "missed"
    assert "is quantised already: fold before quantising" in remark.message
