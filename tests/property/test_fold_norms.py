"""Folding is exact for every shape, every kind of norm and every choice of biases."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modelathe.ir import capture
from modelathe.passes import Canonicalize, FoldNorms
from support.numeric import EXACT, relative_error, rounding

F = nn.functional
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=10)
@given(
    width=st.integers(1, 9),
    out=st.integers(1, 5),
    rms=st.booleans(),
    norm_bias=st.booleans(),
    linear_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_folding_keeps_the_function(
    width: int,
    out: int,
    rms: bool,
    norm_bias: bool,
    linear_bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    norm = nn.RMSNorm(width, eps=1e-5) if rms else nn.LayerNorm(width, bias=norm_bias)
    model = nn.Sequential(norm, nn.Linear(width, out, bias=linear_bias)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.to(dtype)
    x = torch.randn(3, width).to(dtype)
    program = Canonicalize()(capture(model, (x,))).program

    result = FoldNorms()(program)

    assert [remark.kind for remark in result.remarks] == ["applied"]
    (name,) = program.signature.inputs
    wide = result.program.run({name: x}, dtype=torch.float64)["output"]
    assert relative_error(program.run({name: x}, dtype=torch.float64)["output"], wide) <= EXACT
    found = result.program.run({name: x})["output"].double()
    normal = (F.rms_norm if rms else F.layer_norm)(x, [width], eps=1e-5).double()
    gain, weight = (part.weight.detach().double() for part in model)
    shift, bias = (_bias(part) for part in model)
    expected = normal @ (weight * gain).T + weight @ (shift + 0 * gain) + bias
    # the folded weight and bias, `width` products and the result are each rounded
    sizes = normal.abs() @ (weight * gain).abs().T + weight.abs() @ (shift.abs() + 0 * gain)
    limit = rounding(dtype, steps=2 * width + 6) * (sizes + bias.abs())
    assert bool(((found - expected).abs() <= limit).all())


def _bias(part: nn.Module) -> Tensor:
    bias = getattr(part, "bias", None)
    return torch.zeros(1).double() if bias is None else bias.detach().double()
