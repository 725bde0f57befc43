"""Batch norms in ONNX: gone where they are folded, right where they stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import Program, capture
from modelathe.passes import FoldBatchNorms, FoldRepBatchNorms, Pass, ReplaceNorms
from support.feeds import feed
from support.models import canonical, context, perturb
from support.numeric import worst_error
from support.onnx_models import emitted, opened, operators, ran

LIMIT = 1e-5  # float32, a few operators in a row


def check(program: Program, inputs: dict[str, Tensor]) -> dict[str, int]:
    """Check that ONNX Runtime agrees with eager; return how often each operator occurs."""
    model = emitted(program)
    assert worst_error(ran(opened(model), inputs), program.run(inputs)) <= LIMIT
    return operators(model)


@pytest.mark.parametrize(
    ("name", "pass_", "before", "after"),
    [("conv-norms", FoldBatchNorms(), 3, 1), ("rep-tokens", FoldRepBatchNorms(), 4, 0)],
)
def test_folded_batch_norms_are_gone(name: str, pass_: Pass, before: int, after: int) -> None:
    program = canonical(name)
    inputs = feed(program)
    assert check(program, inputs)["BatchNormalization"] == before
    folded = check(pass_(program).program, inputs)
    assert folded["BatchNormalization"] == after
    assert folded["Transpose"] <= 1


def test_norms_that_were_replaced_run_folded_and_unfolded() -> None:
    program = canonical("token-norm")
    inputs = {"input_ids": torch.arange(12).reshape(2, 6)}
    made = ReplaceNorms()(program, context()).program
    assert check(made, inputs)["BatchNormalization"] == 1
    folded = check(FoldRepBatchNorms()(made).program, inputs)
    assert set(folded) == {"Gather", "MatMul", "Add"}


class Transposed(nn.Module):
    """Transposed convolutions with batch norms that fold, and one of every kind that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, output_padding=1)
        self.wide = nn.ConvTranspose2d(6, 4, 3, dilation=2, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm1d(6), nn.BatchNorm2d(4, affine=False)])

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norms[0](self.up(x)))
        result: Tensor = self.norms[1](torch.relu(self.wide(y.unsqueeze(2).expand(-1, -1, 3, -1))))
        return result


def test_transposed_convolutions_take_batch_norms_in() -> None:
    model = Transposed().eval()
    perturb(model)
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    program = capture(model, (x,))
    assert check(program, {"x": x})["BatchNormalization"] == 2
    assert check(FoldBatchNorms()(program).program, {"x": x})["BatchNormalization"] == 1
