"""Products with a weight of few entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modelathe.ir import quant
from modelathe.ir.sparse import index_dtype

linear = torch.ops.modelathe.sparse_linear
OUT, IN = 6, 10


def entries(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a weight, and its parts as stored: an empty row and a full one among them."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(OUT, IN, generator=generator, dtype=dtype)
    kept = torch.rand(OUT, IN, generator=generator) < 0.2
    kept[2], kept[4] = False, True
    columns, counts = kept.nonzero()[:, 1], kept.sum(1)
    return weight * kept, weight[kept], columns.to(torch.uint8), counts.to(torch.uint8)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=dtype)


@pytest.mark.parametrize("tile", [1 << 19, 25])
@pytest.mark.parametrize("narrow", [torch.uint8, torch.int16, torch.int32])
def test_it_is_linear_of_the_filled_in_weight(
    monkeypatch: pytest.MonkeyPatch, tile: int, narrow: torch.dtype
) -> None:
    monkeypatch.setattr(quant, "_TILE", tile)
    weight, values, *places = entries()
    x = noise(2, 3, IN)
    expected = torch.nn.functional.linear(x, weight)
    found = linear(x, values, *(part.to(narrow) for part in places))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(255, torch.uint8), (256, torch.int16), (32767, torch.int16), (32768, torch.int32)],
)
def test_places_are_of_the_narrowest_type_that_holds_a_row(width: int, dtype: torch.dtype) -> None:
    assert index_dtype(width) == dtype
    full = torch.tensor([width, width - 1])  # a full row's count, the last column
    assert full.to(index_dtype(width)).long().equal(full)


@pytest.mark.parametrize("tile", [1 << 19, 25])
def test_gradients(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(quant, "_TILE", tile)
    _, values, *places = entries(torch.float64)
    x = noise(2, 2, IN, dtype=torch.float64).requires_grad_()
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: linear(x, v, *places), (x, values))


def test_schema_fake_and_gradient_agree() -> None:
    _, *parts = entries()
    torch.library.opcheck(linear.default, (noise(2, IN).requires_grad_(), *parts))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, IN, dtype=torch.int64)}, "not floating-point"),
        ({"columns": torch.zeros(3)}, "not uint8, int16 or int32"),
        ({"counts": torch.zeros(OUT, dtype=torch.int64)}, "not uint8, int16 or int32"),
        ({"columns": torch.zeros(2, dtype=torch.uint8)}, "do not fit"),
        ({"values": torch.zeros(3, 1)}, "do not fit"),
        ({"counts": torch.zeros(OUT, 1, dtype=torch.uint8)}, "do not fit"),
    ],
)
def test_the_shape_rule_refuses_parts_that_do_not_fit(
    changes: dict[str, Any], message: str
) -> None:
    columns, counts = (torch.zeros(n, dtype=torch.uint8) for n in (3, OUT))
    given = {"x": noise(2, IN), "values": noise(3), "columns": columns, "counts": counts}
    with pytest.raises(RuntimeError, match=message):
        linear(**{key: value.to("meta") for key, value in (given | changes).items()})
