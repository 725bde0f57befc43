"""Folding and centring are exact for every shape, every norm and every choice of biases."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modelathe.ir import Norm, capture
from modelathe.passes import Canonicalize, CenterResidual, FoldNorms, Pass
from modelathe.passes.fidelity import judge_rounding
from support.numeric import EXACT, relative_error, rounding
from support.views import views

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


class Transformer(nn.Module):
    """Two embeddings, grouped attention and a head; a residual stream with a mean of 3."""

    def __init__(self, heads: int, groups: int, size: int, *, norm_bias: bool, bias: bool) -> None:
        super().__init__()
        width = self.width = heads * size
        self.sizes = (heads, groups, size)
        self.embed, self.types = nn.Embedding(11, width), nn.Embedding(11, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width, bias=norm_bias) for _ in range(3)])
        self.fused = nn.Linear(width, (heads + 2 * groups) * size, bias=bias)
        self.out, self.up = nn.Linear(width, width, bias=bias), nn.Linear(width, 5)
        self.down, self.head = nn.Linear(5, width, bias=bias), nn.Linear(width, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        heads, groups, size = self.sizes
        x = self.embed(ids) + self.types(ids)
        parts = self.fused(self.norms[0](x)).unflatten(-1, (-1, size)).transpose(1, 2)
        q, k, v = parts.split([heads, groups, groups], 1)
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(torch.relu(self.up(self.norms[1](x))))
        result: Tensor = self.head(self.norms[2](x))
        return result


ALL = FoldNorms(center_readers=True, value_bias=True, center_logits=True)


@settings(max_examples=12)
@given(
    groups=st.integers(1, 2),
    repeats=st.integers(1, 3),
    size=st.integers(2, 3),
    norm_bias=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 2**31),
)
def test_every_rewrite_keeps_the_function(
    groups: int,
    repeats: int,
    size: int,
    norm_bias: bool,
    bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model = Transformer(groups * repeats, groups, size, norm_bias=norm_bias, bias=bias).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        model.embed.weight += 3.0
    program = Canonicalize()(capture(model.to(dtype), (torch.arange(8).view(2, 4),))).program
    names = {name: s.renamed({"output": "logits"}) for name, s in program.signatures.items()}
    program = replace(program, signatures=names)

    passes: list[Pass] = [ALL, CenterResidual()]
    for pass_ in passes:
        result = pass_(program)
        assert judge_rounding(program, result.program, "here", pass_.kept).error <= EXACT
        program = result.program

    norms = views(Norm, program)
    assert [(norm.kind, norm.gain, norm.bias) for norm in norms] == [("rms", None, None)] * 3
