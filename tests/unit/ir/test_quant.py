from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelathe.ir import quant
from modelathe.ir.quant import QuantizedTensor, QuantType, choose_grid, pack, quantize, unpack

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def steps_moved(weight: Tensor, quantized: QuantizedTensor) -> Tensor:
    """|weight - dequantised| in steps of the group, [out, groups, group]."""
    restored = quantized.dequantize(quant.wider(weight.dtype)).double()
    steps = quantized.scales.double().abs().unsqueeze(-1)
    return (weight.double() - restored).abs().view(*steps.shape[:2], -1) / steps


def half_a_step(weight: Tensor, bits: int) -> float:
    # scale, w / scale, scale * level, the difference: at most 2**bits steps, each rounded (eps / 2)
    return 0.5 + 2 * 2**bits * torch.finfo(quant.wider(weight.dtype)).eps


def rows_of_every_kind(dtype: torch.dtype) -> Tensor:
    """[8, 96]: the shapes of data that break grids."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(8, 96, generator=generator, dtype=torch.float64)
    normal[1] = normal[1].abs()
    normal[2] = -normal[2].abs()
    normal[3] = 0
    normal[4, ::7] *= 50  # outliers
    normal[5] = 3.7
    if dtype != torch.float64:  # whose scales are computed in float64 too, so not rounded up
        normal[6] *= torch.finfo(dtype).smallest_normal
    normal[7, 32:64] = 0
    normal[7, 64:] = torch.tensor([-1.0, 1.0]).repeat(16)  # both extremes equally large
    return normal.to(dtype)


@pytest.mark.parametrize("bits", quant.WIDTHS)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 40])
def test_packed_codes_lie_in_bit_order_low_bits_first(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, count), generator=torch.Generator().manual_seed(bits))
    packed = pack(codes.to(torch.uint8), bits)
    for row, given in zip(packed.tolist(), codes.tolist(), strict=True):
        value = int.from_bytes(bytes(row), "little")
        assert value == sum(code << (bits * i) for i, code in enumerate(given))
    assert packed.shape == (3, -(-count * bits // 8))


def test_two_codes_of_4_bits_lie_low_nibble_first() -> None:
    assert pack(torch.tensor([[0x1, 0x2, 0x3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]


def test_unpack_refuses_a_width_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="10 codes of 3 bits take 4 bytes, got 5"):
        unpack(torch.zeros(1, 5, dtype=torch.uint8), 3, 10)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 16, 32])
@pytest.mark.parametrize("bits", quant.WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_weight_moves_by_more_than_half_a_step(
    dtype: torch.dtype, bits: int, group_size: int, symmetric: bool
) -> None:
    weight = rows_of_every_kind(dtype)
    quantized = quantize(weight, QuantType(bits, group_size, symmetric))
    assert quantized.scales.dtype == dtype
    assert steps_moved(weight, quantized).max() <= half_a_step(weight, bits)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clip", ["none", "weight"])
def test_zero_stays_zero(clip: quant.Clip, symmetric: bool) -> None:
    weight = rows_of_every_kind(torch.float16)
    restored = quantize(weight, QuantType(3, 32, symmetric), clip).dequantize()
    assert (restored[weight == 0] == 0).all()


def test_the_step_spans_the_range_and_no_more() -> None:
    weight = torch.tensor([[-3.0, 0.0, 12.0]])
    grid = choose_grid(weight, QuantType(4, -1, symmetric=False))
    assert grid.zeros is not None
    assert (grid.scales.item(), grid.zeros.item()) == (1.0, 3)


@pytest.mark.parametrize(
    ("row", "scale"),
    [([-8.0, 7.0], 1.0), ([8.0, -7.0], -1.0), ([7.5, -7.5], 1.0), ([0.0, 4.0], -0.5)],
)
def test_a_symmetric_scale_turns_its_long_side_to_the_larger_extreme(
    row: list[float], scale: float
) -> None:
    grid = choose_grid(torch.tensor([row]), QuantType(4, -1, symmetric=True))
    assert (grid.scales.item(), grid.zeros) == (scale, None)


def test_a_coarse_scale_is_rounded_up() -> None:
    weight = torch.tensor([[0.0, 255 * 1.001]]).bfloat16()  # 1.001 is below the next bfloat16
    step = choose_grid(weight, QuantType(8, -1, symmetric=False)).scales.double()
    assert step.item() >= weight.double().max().item() / 255


def test_clipping_never_adds_squared_error_and_helps_normal_rows() -> None:
    weight = rows_of_every_kind(torch.float32)
    for qtype in (QuantType(3, 32, symmetric=False), QuantType(2, -1, symmetric=True)):
        plain, clipped = (
            (quantize(weight, qtype, clip).dequantize() - weight).square().view(8, -1)
            for clip in ("none", "weight")
        )
        assert (clipped.sum(1) <= plain.sum(1) * (1 + 1e-5)).all()
        assert clipped[:3].sum() < 0.9 * plain[:3].sum()


@pytest.mark.parametrize(("bits", "outlier"), [(3, 3.0), (2, 12.0)])
def test_clipping_finds_the_best_of_its_80_factors(bits: int, outlier: float) -> None:
    weight = torch.randn(1, 2048, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[0, 7] = outlier
    qtype = QuantType(bits, -1, symmetric=False)
    plain = choose_grid(weight, qtype)
    errors = []
    for step in range(80):
        grid = quant.Grid(qtype, plain.scales * (1 - step / 100), plain.zeros)
        restored = QuantizedTensor.from_codes(quant.encode(weight, grid), grid).dequantize()
        errors.append((restored - weight).square().sum().item())
    clipped = quantize(weight, qtype, "weight").dequantize()
    assert (clipped - weight).square().sum().item() == pytest.approx(min(errors))
    assert (errors.index(min(errors)) > 50) is (outlier > 10)


@pytest.mark.parametrize("clip", ["none", "weight"])
def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, clip: quant.Clip) -> None:
    weight, qtype = rows_of_every_kind(torch.float32), QuantType(3, 32, symmetric=False)
    whole = quantize(weight, qtype, clip)
    monkeypatch.setattr(quant, "_TILE", 200)
    tiled = quantize(weight, qtype, clip)
    assert tiled.codes.equal(whole.codes)
    assert tiled.scales.equal(whole.scales)
    assert tiled.dequantize().equal(whole.dequantize())


@pytest.mark.parametrize("group_size", [-1, 32])
def test_a_transposed_weight_is_quantized_like_its_copy(group_size: int) -> None:
    weight, qtype = rows_of_every_kind(torch.float32), QuantType(4, group_size, symmetric=False)
    strided = weight.T.contiguous().T
    assert quantize(strided, qtype).codes.equal(quantize(weight, qtype).codes)


def test_bytes_are_those_of_the_tensors() -> None:
    for qtype in (QuantType(3, 24, symmetric=False), QuantType(4, -1, symmetric=True)):
        quantized = quantize(rows_of_every_kind(torch.float16), qtype)
        parts = [quantized.codes, quantized.scales]
        parts += [] if quantized.zeros is None else [quantized.zeros]
        assert quantized.nbytes == sum(part.nbytes for part in parts)


def test_from_codes_and_grid_are_inverse() -> None:
    quantized = quantize(rows_of_every_kind(torch.float32), QuantType(3, 32, symmetric=False))
    codes = unpack(quantized.codes, 3, 96)
    again = QuantizedTensor.from_codes(codes, quantized.grid)
    assert again.zeros is not None
    assert again.codes.equal(quantized.codes)
    assert again.zeros.equal(quantized.zeros)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(2, 48), "32 does not divide 48"),
        (torch.ones(2, 3, 32), r"a matrix of floating-point numbers is expected, got float32 \[2,"),
        (torch.ones(2, 32, dtype=torch.int64), "got int64"),
        (torch.ones(0, 32), "matrix"),
        (torch.tensor([[1.0, torch.nan] * 16]), "nan or inf"),
        (torch.tensor([[1.0, -torch.inf] * 16]), "nan or inf"),
    ],
)
def test_what_cannot_be_quantized_is_refused(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(weight, QuantType(4, 32, symmetric=False))


@pytest.mark.parametrize(("bits", "group_size"), [(5, 32), (1, 32), (4, 0), (4, -2)])
def test_a_type_checks_its_numbers(bits: int, group_size: int) -> None:
    with pytest.raises(ValueError, match=r"bits is|group_size is"):
        QuantType(bits, group_size, symmetric=False)
