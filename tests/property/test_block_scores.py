"""What LIM and ZD promise for any numbers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from modelathe.ir import TensorWeight
from modelathe.passes.analysis.block_influence import token_cosines
from modelathe.passes.analysis.lim import flat_cosines, moments
from modelathe.passes.analysis.zd import Sided, share_above

SEEDS = st.integers(0, 2**16)
SCALES = st.floats(1e-3, 1e3)


def tensors(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(2, 5, 8, generator=generator)
    return before, before + torch.randn(2, 5, 8, generator=generator) * (seed % 7)


@given(SEEDS, SCALES)
def test_lim_is_a_cosine_that_the_size_of_the_output_does_not_change(seed: int, c: float) -> None:
    before, after = tensors(seed)
    one = flat_cosines(moments(before, after)[None])
    assert -1 <= float(one) <= 1
    torch.testing.assert_close(
        flat_cosines(moments(before, after.double() * c)[None]), one, rtol=0, atol=1e-12
    )
    assert float(flat_cosines(moments(before, before)[None])) == 1.0
    assert bool((token_cosines(before, after).abs() <= 1 + 1e-12).all())


@given(SEEDS, SCALES, st.floats(-100, 100), st.sampled_from(["one", "two"]), st.booleans())
def test_zd_is_blind_to_affine_maps(
    seed: int, a: float, c: float, sided: Sided, negative: bool
) -> None:
    numbers = tensors(seed)[1].double().view(8, 10)
    share = share_above([TensorWeight(numbers)], sided)
    assert 0 <= share <= 1
    factor = -a if negative and sided == "two" else a
    assert share_above([TensorWeight(factor * numbers + c)], sided) == share
