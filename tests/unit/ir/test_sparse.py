"""Products with a weight of few entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modelathe.ir import quant

linear = torch.ops.modelathe.sparse_linear
OUT, IN = 6, 10


def entries(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight, and its values and places: an empty row and a full one among them."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(OUT, IN, generator=generator, dtype=dtype)
    kept = torch.rand(OUT, IN, generator=generator) < 0.2
    kept[2], kept[4] = False, True
    places = kept.flatten().nonzero().view(-1)
    return weight.masked_fill(~kept, 0), weight.flatten()[places], places.to(torch.int32)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=dtype)


@pytest.mark.parametrize("tile", [1 << 19, 25])
@pytest.mark.parametrize("wide", [torch.int32, torch.int64])
def test_it_is_linear_of_the_filled_in_weight(
    monkeypatch: pytest.MonkeyPatch, tile: int, wide: torch.dtype
) -> None:
    monkeypatch.setattr(quant, "_TILE", tile)
    weight, values, indices = entries()
    x = noise(2, 3, IN)
    expected = torch.nn.functional.linear(x, weight)
    torch.testing.assert_close(linear(x, values, indices.to(wide), OUT), expected)


@pytest.mark.parametrize("tile", [1 << 19, 25])
def test_gradients(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(quant, "_TILE", tile)
    _, values, indices = entries(torch.float64)
    x = noise(2, 2, IN, dtype=torch.float64).requires_grad_()
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: linear(x, v, indices, OUT), (x, values))


def test_schema_fake_and_gradient_agree() -> None:
    _, values, indices = entries()
    torch.library.opcheck(linear.default, (noise(2, IN).requires_grad_(), values, indices, OUT))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, IN, dtype=torch.int64)}, "not floating-point"),
        ({"indices": torch.zeros(3)}, "not int32 or int64"),
        ({"indices": torch.zeros(2, dtype=torch.int32)}, "do not fit"),
        ({"values": torch.zeros(3, 1)}, "do not fit"),
    ],
)
def test_the_shape_rule_refuses_parts_that_do_not_fit(
    changes: dict[str, Any], message: str
) -> None:
    indices = torch.zeros(3, dtype=torch.int32)
    given = {"x": noise(2, IN), "values": noise(3), "indices": indices} | changes
    with pytest.raises(RuntimeError, match=message):
        linear(**{key: value.to("meta") for key, value in given.items()}, out_features=OUT)
