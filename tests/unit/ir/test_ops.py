from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modelathe.ir import quant
from modelathe.ir.quant import QuantizedTensor, QuantType, quantize

linear = torch.ops.modelathe.quantized_linear
embedding = torch.ops.modelathe.quantized_embedding
rotary = torch.ops.modelathe.rotary
CASES = [(4, 16, False), (3, 8, True), (2, -1, False), (8, -1, True)]


def quantized(
    bits: int, group_size: int, symmetric: bool, dtype: torch.dtype = torch.float32
) -> QuantizedTensor:
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))
    return quantize(weight.to(dtype), QuantType(bits, group_size, symmetric))


def parts(weight: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return weight.codes, weight.scales, weight.zeros


def numbers(weight: QuantizedTensor) -> tuple[int, int, int]:
    return weight.qtype.bits, weight.qtype.group_size, weight.in_features


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_linear_of_the_dequantized_weight(case: Any, dtype: torch.dtype) -> None:
    weight, x, bias = quantized(*case, dtype=dtype), noise(2, 3, 48, dtype=dtype), noise(6)
    expected = torch.nn.functional.linear(x, weight.dequantize(dtype), bias.to(dtype))
    assert linear(x, *parts(weight), bias.to(dtype), *numbers(weight)).equal(expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_embedding_is_rows_of_the_dequantized_weight(case: Any, dtype: torch.dtype) -> None:
    weight, ids = quantized(*case, dtype=dtype), torch.tensor([[5, 0, 0], [2, 1, 5]])
    for given in (ids, ids.int(), ids[:, :0]):
        result = embedding(given, *parts(weight), *numbers(weight))
        assert result.equal(weight.dequantize()[given.long()])
        assert result.dtype == dtype


def test_a_narrow_scale_is_multiplied_in_float32_for_a_wide_input() -> None:
    weight, x = quantized(8, -1, symmetric=False, dtype=torch.bfloat16), noise(2, 48)
    exact = x.double() @ weight.dequantize(torch.float64).T
    result = linear(x, *parts(weight), None, *numbers(weight))
    assert (result - exact).abs().max() < 1e-5  # bfloat16 weights would be off by 1e-2


def test_tiles_change_only_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = quantized(4, 16, symmetric=False), noise(3, 48).requires_grad_()
    weight.scales.requires_grad_()
    results = []
    for tile in (1 << 20, 100):
        monkeypatch.setattr(quant, "_TILE", tile)
        y = linear(x, *parts(weight), noise(6), *numbers(weight))
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight.scales))))
    for whole, tiled in zip(*results, strict=True):
        torch.testing.assert_close(tiled, whole)


@pytest.mark.parametrize("case", CASES)
def test_linear_gradients(case: Any) -> None:
    weight = quantized(*case, dtype=torch.float64)
    codes, scales, zeros = parts(weight)
    inputs = tuple(
        t.double().requires_grad_() for t in (noise(2, 2, 48), scales.detach(), noise(6))
    )
    assert torch.autograd.gradcheck(
        lambda x, scales, bias: linear(x, codes, scales, zeros, bias, *numbers(weight)), inputs
    )


@pytest.mark.parametrize("case", CASES)
def test_embedding_gradients(case: Any) -> None:
    weight, ids = quantized(*case, dtype=torch.float64), torch.tensor([[5, 0, 0], [2, 1, 5]])
    codes, scales, zeros = parts(weight)
    assert torch.autograd.gradcheck(
        lambda scales: embedding(ids, codes, scales, zeros, *numbers(weight)),
        (scales.detach().requires_grad_(),),
    )


@pytest.mark.parametrize("case", CASES[:2])
def test_schema_fake_and_gradient_agree(case: Any) -> None:
    weight = quantized(*case)
    x, ids = noise(2, 48).requires_grad_(), torch.tensor([5, 0, 0])
    torch.library.opcheck(linear.default, (x, *parts(weight), noise(6), *numbers(weight)))
    torch.library.opcheck(embedding.default, (ids, *parts(weight), *numbers(weight)))


class Tied(torch.nn.Module):
    """An embedding and a head on one quantised tensor."""

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        wide = embedding(ids, *parts(self.weight), *numbers(self.weight))
        result: Tensor = linear(wide, *parts(self.weight), None, *numbers(self.weight))
        return result


def test_sizes_of_the_input_may_stay_symbolic() -> None:
    weight = quantized(4, 16, symmetric=False)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    ids = torch.zeros(2, 3, dtype=torch.int64)
    program = torch.export.export(Tied(weight), (ids,), dynamic_shapes=(dynamic,))
    other = torch.tensor([[1, 2, 3, 4, 5]])
    assert program.module()(other).equal(Tied(weight)(other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_features": 32}, "x is 48 wide, the weight 32|codes are"),
        ({"group_size": 32}, "32 does not divide 48"),
        ({"bits": 8}, "codes are"),
        ({"scales": noise(6, 2)}, "scales are"),
        ({"zeros": torch.zeros(6, 3, dtype=torch.uint8)}, "zeros are"),
        ({"bias": noise(5)}, "bias"),
        ({"x": torch.zeros(2, 48, dtype=torch.int64)}, "not floating-point"),
    ],
)
def test_the_shape_rule_refuses_parts_that_do_not_fit(
    changes: dict[str, Any], message: str
) -> None:
    weight = quantized(4, 16, symmetric=False)
    given: dict[str, Any] = {
        "x": noise(2, 48), "codes": weight.codes, "scales": weight.scales, "zeros": weight.zeros,
        "bias": noise(6), "bits": 4, "group_size": 16, "in_features": 48,
    }  # fmt: skip
    given |= changes
    meta = {key: v.to("meta") if isinstance(v, Tensor) else v for key, v in given.items()}
    with pytest.raises((RuntimeError, ValueError), match=message):
        linear(**meta)


def heads(dtype: torch.dtype = torch.float32, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Return heads ``[2, 3, 5, 8]``, and cosines and sines for six of the eight channels."""
    angles = 3 * noise(rows, 5, 3)
    return noise(2, 3, 5, 8).to(dtype), angles.cos().to(dtype), angles.sin().to(dtype)


def formula(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Write rotary positions as models do."""
    first, rest = x[..., :6], x[..., 6:]
    if interleaved:
        turned = torch.stack([-first[..., 1::2], first[..., ::2]], -1).flatten(-2)
        wide = [part.repeat_interleave(2, -1)[:, None] for part in (cos, sin)]
    else:
        turned = torch.cat([-first[..., 3:], first[..., :3]], -1)
        wide = [torch.cat([part, part], -1)[:, None] for part in (cos, sin)]
    return torch.cat([first * wide[0] + turned * wide[1], rest], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_rotary_is_the_formula_bit_for_bit(dtype: torch.dtype, interleaved: bool) -> None:
    for rows in (1, 2):
        x, cos, sin = heads(dtype, rows)
        for given in ((x, cos, sin), (x, cos.float(), sin.float())):
            found = rotary(*given, interleaved)
            assert found.equal(formula(*given, interleaved))
            assert found.dtype == torch.result_type(x, given[1])


def test_rotary_turns_all_channels_where_there_is_an_angle_for_all() -> None:
    x, cos, sin = heads()
    assert rotary(x[..., :6], cos, sin, False).equal(rotary(x, cos, sin, False)[..., :6])
    assert rotary(x, cos, sin, False)[..., 6:].equal(x[..., 6:])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotary_gradients(rows: int, interleaved: bool) -> None:
    inputs = tuple(part.requires_grad_() for part in heads(torch.float64, rows))
    assert torch.autograd.gradcheck(lambda *given: rotary(*given, interleaved), inputs)
    torch.library.opcheck(rotary.default, (*inputs, interleaved))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_have_the_dtypes_of_what_they_are_of(dtype: torch.dtype) -> None:
    x, cos, sin = heads()
    given = [part.requires_grad_() for part in (x.to(dtype), cos, sin)]
    grads = torch.autograd.grad(rotary(*given, True).sum(), given)
    assert [grad.dtype for grad in grads] == [dtype, torch.float32, torch.float32]


def test_angles_that_are_not_trained_keep_no_heads_in_memory() -> None:
    x, cos, sin = heads()
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        rotary(x.requires_grad_(), cos, sin, False)
    assert kept == [cos.shape, sin.shape]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": noise(2, 3, 5)}, "x has 3 axes"),
        ({"x": noise(2, 3, 5, 4)}, "6 channels of 4 cannot be turned"),
        ({"x": torch.zeros(2, 3, 5, 8, dtype=torch.int64)}, "not floating-point"),
        ({"x": noise(2, 3, 4, 8)}, "broadcast"),
        ({"x": noise(3, 3, 5, 8)}, "broadcast"),
        ({"x": noise(1, 3, 5, 6)}, "more rows of angles"),
        ({"cos": noise(2, 5, 2)}, "one width"),
        ({"sin": noise(2, 1, 5, 3)}, "axes"),
        ({"cos": noise(2, 5, 0), "sin": noise(2, 5, 0)}, "0 channels"),
    ],
)
def test_the_shape_rule_of_rotary_refuses_parts_that_do_not_fit(
    changes: dict[str, Tensor], message: str
) -> None:
    given = dict(zip(("x", "cos", "sin"), heads(), strict=True)) | changes
    with pytest.raises(RuntimeError, match=message):
        rotary(**{key: part.to("meta") for key, part in given.items()}, interleaved=False)


def test_a_second_registration_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="quantized_linear"):
        torch.library.define("modelathe::quantized_linear", "(Tensor x) -> Tensor")
