"""Batch norms that cannot be folded stay, with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modelathe.passes import FoldBatchNorms, QuantizeWeights
from support.models import canonical
from support.small import Build, captured, chain

TWO = (2, 4, 5, 6)
BN, RELU = nn.BatchNorm2d, nn.ReLU()


class Read(nn.Module):
    """A convolution and its norm; ``join`` makes the output from both values and the input."""

    def __init__(self, join: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.conv, self.norm, self.join = nn.Conv2d(4, 4, 1), BN(4), join

    def forward(self, x: Tensor) -> object:
        y = self.conv(x)
        return self.join(y, self.norm(y))


REFUSED = {
    "zero padding": (
        chain(RELU, BN(4), nn.Conv2d(4, 6, 3, padding=1)),
        r"%conv2d \(aten.conv2d\) pads with zeros, which are not shifted",
    ),
    "same padding": (chain(RELU, BN(4), nn.Conv2d(4, 6, 3, padding="same")), "pads with zeros"),
    "padded before": (
        chain(RELU, BN(4), nn.ZeroPad2d(1), nn.Conv2d(4, 6, 3)),
        r"pads its result with values that are not shifted",
    ),
    "transposed": (chain(RELU, BN(4), nn.ConvTranspose2d(4, 6, 2)), "add the shift unevenly"),
    "activations": (
        chain(RELU, BN(4), RELU),
        r"its input comes from %relu \(aten.relu\); its result is read by %relu_1 \(aten.relu\)",
    ),
    "input": (chain(BN(4), RELU), "its input comes from %input_1, an input of the graph"),
    "flattened": (chain(RELU, BN(4), nn.Flatten(), nn.Linear(120, 3)), "is read by %view"),
    "other axis": (chain(RELU, BN(4), nn.Linear(6, 3)), "another axis than the channels"),
    "read before": (
        lambda: Read(lambda y, z: torch.relu(y) + torch.relu(z)),
        r"its input is also read by %relu \(aten.relu\)",
    ),
    "returned": (lambda: Read(lambda y, z: (y, z)), "its input is also read by the output of the"),
    "returned itself": (chain(RELU, BN(4)), "its result is an output of the graph"),
    "statistics of the batch": (
        chain(nn.Conv2d(4, 4, 1), BN(4, track_running_stats=False)),
        "computes its statistics from the batch",
    ),
}


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_folded_says_why(build: Build, reason: str) -> None:
    before = captured(build, *TWO)
    result = FoldBatchNorms()(before)
    (remark,) = result.remarks
    assert remark.kind == "missed"
    assert re.search(reason, remark.message), remark.message


def test_a_quantized_reader_keeps_its_norm() -> None:
    before = captured(chain(nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 6)), 5, 4)
    coded = QuantizeWeights(group_size=4)(before).program
    (remark,) = FoldBatchNorms()(coded).remarks
    assert "quantised already: fold before quantising" in remark.message


def test_half_of_a_rep_batch_norm_is_left_to_its_own_pass() -> None:
    result = FoldBatchNorms()(canonical("rep-tokens"))
    assert len(result.remarks) == 4
    assert all("see fold-rep-batch-norms" in remark.message for remark in result.remarks)
