from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelathe.ir.cache import (
    WIDTHS,
    dequantize_cache,
    pack_planes,
    packs,
    quantize_cache,
    unpack_planes,
)
from support.numeric import numbers

ops = torch.ops.modelathe
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
every_width = pytest.mark.parametrize("bits", WIDTHS)


def levels(x: Tensor, bits: int) -> Tensor:
    """Return what codes stand for, in float64: nothing is rounded but the codes themselves."""
    codes, scales, zeros = quantize_cache(x, bits)
    return (unpack_planes(codes, bits).double() - zeros.double()) * scales.double()


@every_width
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0.0, 9.0, -9.0])
def test_a_number_moves_by_at_most_half_a_step(bits: int, dtype: torch.dtype, shift: float) -> None:
    x = numbers(2, 3, 50, 16, dtype=dtype) + shift
    _, scales, _ = quantize_cache(x, bits)
    gap = (levels(x, bits) - x.double()).abs()
    assert (gap <= scales.double() * (0.5 + 1e-5)).all()  # x / scale is rounded in float32
    assert (gap > 0.45 * scales.double()).any()


@every_width
def test_codes_are_those_of_kvtuner_where_a_token_has_both_signs(bits: int) -> None:
    x = numbers(4, 2, 30, 16, dtype=torch.float64)
    lowest, highest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    assert (lowest < 0).all()
    assert (highest > 0).all()
    scale = (highest - lowest).clamp_min(1e-5) / (2**bits - 1)
    zero = (lowest / scale).round() + 2 ** (bits - 1)
    code = (x / scale - zero).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    torch.testing.assert_close(levels(x, bits), (code + zero) * scale, rtol=0, atol=1e-12)


@every_width
def test_a_token_of_equal_numbers_and_one_of_zeros_are_close(bits: int) -> None:
    x = torch.tensor([0.0, 2.5, -2.5]).view(3, 1).expand(3, 8)
    torch.testing.assert_close(levels(x, bits), x.double(), rtol=1e-6, atol=1.1e-5)


@every_width
def test_planes_are_read_back(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(1 << bits, (3, 5, 24), generator=generator, dtype=torch.uint8)
    packed = pack_planes(codes, bits)
    assert packed.shape == (3, 5, 24 * bits // 8)
    assert torch.equal(unpack_planes(packed, bits), codes)


def test_low_bits_hold_the_first_channels() -> None:
    assert pack_planes(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [0b00111001]


def test_codes_fill_whole_bytes_or_do_not() -> None:
    assert packs(4, 2)
    assert not packs(6, 2)
    with pytest.raises(RuntimeError, match="do not fit"):
        ops.quantize_cache(torch.empty(1, 6, device="meta"), 2)


@every_width
@pytest.mark.parametrize("dtype", DTYPES)
def test_reading_is_rounded_once_to_the_dtype_of_the_scales(bits: int, dtype: torch.dtype) -> None:
    x = numbers(2, 3, 5, 16, dtype=dtype)
    found = dequantize_cache(*quantize_cache(x, bits), x, bits)
    assert found.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found, levels(x, bits).to(wide).to(dtype), rtol=1e-6, atol=0)


def test_nan_stays_nan() -> None:
    x = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    found = dequantize_cache(*quantize_cache(x, 4), x, 4)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_the_gradient_passes_new_tokens_as_if_nothing_was_rounded() -> None:
    x, past = numbers(1, 2, 3, 8).requires_grad_(), numbers(1, 2, 4, 8)
    parts = zip(quantize_cache(past, 4), ops.quantize_cache(x, 4), strict=True)
    joined = [torch.cat([old, new], -2) for old, new in parts]
    read = ops.dequantize_cache(*joined, x, 4)
    assert read.shape == (1, 2, 7, 8)
    slope = numbers(1, 2, 7, 8)
    (read * slope).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, slope[..., 4:, :])


@pytest.mark.parametrize(
    ("codes", "zeros", "message"),
    [((1, 4, 3), (1, 4, 1), "are not 8"), ((1, 4, 4), (1, 3, 1), "do not fit codes")],
)
def test_parts_that_do_not_fit_are_refused(
    codes: tuple[int, ...], zeros: tuple[int, ...], message: str
) -> None:
    made = [torch.empty(shape, dtype=torch.uint8, device="meta") for shape in (codes, zeros)]
    scales = torch.empty(zeros, device="meta")
    with pytest.raises(RuntimeError, match=message):
        ops.dequantize_cache(made[0], scales, made[1], torch.empty(1, 2, 8, device="meta"), 4)
