from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelathe.ir.quant import WIDTHS, QuantType, pack, quantize, unpack

BITS = st.sampled_from(WIDTHS)
numbers = st.floats(-1e4, 1e4, width=16) | st.just(0.0)


@given(bits=BITS, rows=st.integers(1, 4), count=st.integers(1, 70), seed=st.integers(0, 99))
@settings(deadline=None)
def test_unpack_inverts_pack(bits: int, rows: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, count), generator=generator).to(torch.uint8)
    assert unpack(pack(codes, bits), bits, count).equal(codes)


@given(
    bits=BITS,
    symmetric=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    rows=st.lists(st.lists(numbers, min_size=8, max_size=8), min_size=1, max_size=3),
)
@settings(deadline=None)
def test_every_number_moves_by_at_most_half_a_step(
    bits: int, symmetric: bool, dtype: torch.dtype, rows: list[list[float]]
) -> None:
    weight = torch.tensor(rows).to(dtype)
    quantized = quantize(weight, QuantType(bits, 4, symmetric))
    moved = (quantized.dequantize(torch.float32).double() - weight.double()).abs().view(-1, 2, 4)
    step = quantized.scales.double().abs().unsqueeze(-1)
    assert (moved <= step * (0.5 + 2**bits * torch.finfo(torch.float32).eps)).all()
