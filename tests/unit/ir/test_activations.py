from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelathe.ir.activations import WIDTHS, dynamic_step
from support.numeric import numbers

round_activations = torch.ops.modelathe.round_activations
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
every_width = pytest.mark.parametrize("bits", WIDTHS)
SCALE, ZERO = torch.tensor(0.05), torch.tensor(40, dtype=torch.uint8)


@every_width
def test_a_dynamic_token_has_the_levels_of_its_largest_number(bits: int) -> None:
    x = numbers(2, 5, 24, dtype=torch.float64)
    top = 2 ** (bits - 1) - 1
    levels = round_activations(x, None, None, bits) / (x.abs().amax(-1, keepdim=True) / top)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-10)
    assert (levels.abs().amax(-1) - top).abs().max() < 1e-10


@every_width
def test_the_tokens_beside_a_token_change_nothing(bits: int) -> None:
    x = numbers(1, 5, 24)
    alone = torch.cat([round_activations(row, None, None, bits) for row in x.split(1, 1)], 1)
    assert round_activations(x, None, None, bits).equal(alone)


def test_rows_of_zeros_stay_zeros_and_damage_shows() -> None:
    x = torch.zeros(3, 4)
    x[1, 2] = torch.nan
    rounded = round_activations(x, None, None, 8)
    assert rounded[0].equal(x[0])
    assert rounded[1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_has_the_dtype_of_the_activations(dtype: torch.dtype) -> None:
    x = numbers(2, 24, dtype=dtype)
    for given in ((None, None), (SCALE, ZERO)):
        found = round_activations(x, *given, 8)
        fake = torch.ops.modelathe.round_activations(x.to("meta"), *_on_meta(given), 8)
        assert (found.dtype, found.shape) == (fake.dtype, fake.shape) == (dtype, x.shape)


def _on_meta(given: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if part is None else part.to("meta") for part in given]


def test_a_static_code_is_clipped_to_the_range() -> None:
    x = torch.tensor([-9.0, -2.0, 0.0, 0.03, 4.35, 9.0])
    found = round_activations(x, SCALE, ZERO, 7)
    expected = torch.tensor([-40, -40, 0, 1, 87, 87]) * SCALE
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_gradients_pass_but_where_a_number_was_clipped() -> None:
    x = torch.tensor([-9.0, -1.0, 0.01, 9.0], requires_grad=True)
    slope = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for given, expected in (((None, None), slope), ((SCALE, ZERO), slope * x.abs().lt(3))):
        (found,) = torch.autograd.grad((round_activations(x, *given, 7) * slope).sum(), x)
        assert found.equal(expected)


@pytest.mark.parametrize(
    ("x", "scale", "zero", "bits"),
    [
        (torch.ones(3), None, None, 6),
        (torch.ones(3, dtype=torch.int64), None, None, 8),
        (torch.tensor(1.0), None, None, 8),
        (torch.ones(3), SCALE, None, 8),
        (torch.ones(3), SCALE, torch.tensor(40), 8),
        (torch.ones(3), SCALE.view(1), ZERO, 8),
    ],
)
def test_shape_rules(x: Tensor, scale: Tensor | None, zero: Tensor | None, bits: int) -> None:
    x, scale, zero = (None if part is None else part.to("meta") for part in (x, scale, zero))
    with pytest.raises(RuntimeError):
        round_activations(x, scale, zero, bits)


def test_the_step_of_a_row() -> None:
    steps = dynamic_step(torch.tensor([[2.0, -254.0], [0.0, 0.0]]), 8)
    assert steps.tolist() == [[2.0], [1.0]]
