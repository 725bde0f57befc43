"""Calls that are trainable modules while a program is trained: low-rank updates of linears."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, fx, nn

from ...ir import ComputedWeight, Linear, Program, TensorWeight, is_weight


class LowRank(nn.Module):
    """``y = W x + b + (rank scale) U (D x)``: a linear whose weight gets an update of low rank.

    One for each weight, however many linears read it, so tied stays tied.  Down-projection
    D: [rank, in] starts random, up-projection U: [out, rank] at zero, so training starts from the
    model as it is.

    Source: LoRA (arXiv 2106.09685), section 4.1, with alpha = 2 rank.
    """

    SCALE = 2.0

    def __init__(self, weight: str, shape: tuple[int, ...], rank: int, seed: int) -> None:
        super().__init__()
        self.weight = weight
        outputs, inputs = shape
        generator = torch.Generator().manual_seed(seed)
        down = torch.randn((min(rank, *shape), inputs), generator=generator)
        self.down = nn.Parameter(down / math.sqrt(inputs))
        self.up = nn.Parameter(torch.zeros(outputs, len(down)))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return [..., out] for x: [..., in]."""
        update = nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        return nn.functional.linear(x, weight, bias) + self.SCALE * update


def add_low_rank(program: Program, rank: int, seed: int) -> dict[str, LowRank]:
    """Put a low-rank update beside every linear with a weight of its own; return them by weight.

    Args:
        program: an editable copy, only to be trained.
        rank: of the update; at most the smaller side of the weight.
        seed: of the down-projections.
    """
    readers: dict[str, list[fx.Node]] = defaultdict(list)
    for graph in program.graphs.values():
        for node in graph.nodes:
            linear = Linear.match(node)
            if linear is not None and is_weight(linear.weight):
                readers[str(linear.weight.target)].append(node)
    made = {}
    for number, (name, nodes) in enumerate(readers.items()):
        shape = program.weights[name].shape
        made[name] = LowRank(name, shape, rank, seed * 1_000_003 + number)
        for node in nodes:
            node.target = made[name]
    return made


def merged_weight(program: Program, name: str, update: LowRank) -> ComputedWeight:
    """Return the merged weight, computed when it is read."""
    source = program.weights[name]
    factors = (TensorWeight(update.down.detach()), TensorWeight(update.up.detach()))

    def merge(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return weight.double() + LowRank.SCALE * (up.double() @ down.double())

    return ComputedWeight("low-rank", (source, *factors), source.shape, source.dtype, merge)
