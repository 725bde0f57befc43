"""Folding batch norms is exact for every shape of convolution, before and behind the norm."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modelathe.ir import BatchNorm, capture
from modelathe.passes import FoldBatchNorms
from support.models import perturb
from support.numeric import EXACT, relative_error

CONVOLUTIONS = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}


@settings(max_examples=12)
@given(
    dims=st.integers(1, 2),
    transposed=st.booleans(),
    behind=st.booleans(),
    groups=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)),
    padding=st.integers(0, 1),
    biased=st.booleans(),
    affine=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 2**31),
)
def test_folding_keeps_the_function(
    dims: int,
    transposed: bool,
    behind: bool,
    groups: int,
    sizes: tuple[int, int, int, int],
    padding: int,
    biased: bool,
    affine: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    read, made, kernel, stride = sizes
    torch.manual_seed(seed)
    conv = CONVOLUTIONS[dims, transposed](
        read * groups,
        made * groups,
        kernel,
        stride=stride,
        padding=min(padding, kernel // 2),
        groups=groups,
        bias=biased,
    )
    norm = NORMS[dims]((read if behind else made) * groups, affine=affine)
    parts = (nn.Tanh(), norm, conv) if behind else (conv, norm)
    model = nn.Sequential(*parts).eval()
    perturb(model, seed)
    model.to(dtype)
    x = torch.randn(2, read * groups, *[4] * dims).to(dtype)
    program = capture(model, (x,))

    result = FoldBatchNorms()(program)

    refused = behind and (transposed or bool(padding and kernel > 1))
    assert [remark.kind for remark in result.remarks] == ["missed" if refused else "applied"]
    left = sum(BatchNorm.match(node) is not None for node in result.program.graph.nodes)
    assert left == refused
    (name,) = program.signature.inputs
    wide = [
        each.run({name: x}, dtype=torch.float64)["output"] for each in (program, result.program)
    ]
    assert relative_error(*wide) <= EXACT
