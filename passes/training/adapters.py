"""Calls that are trainable modules while a program is trained: low-rank updates of linears."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, fx, nn

from ...ir import ComputedWeight, Linear, Program, TensorWeight
from ..base import Remark


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


def add_low_rank(program: Program, rank: int, seed: int) -> tuple[dict[str, LowRank], list[Remark]]:
    """Put a low-rank update beside every linear with a weight of its own; return them by weight.

    A weight that something else than a linear reads, as a tied head's is by the embedding, has
    none (``missed``): once merged, it would change what that reads, which training did not see.

    Args:
        program: an editable copy, only to be trained.
        rank: of the update; at most the smaller side of the weight.
        seed: of the down-projections.
    """
    linears: dict[str, list[fx.Node]] = defaultdict(list)
    others: dict[str, fx.Node] = {}
    for graph in program.graphs.values():
        for source in graph.find_nodes(op="get_attr"):
            for user in source.users:
                linear = Linear.match(user)
                if linear is not None and linear.weight is source:
                    linears[str(source.target)].append(user)
                else:
                    others[str(source.target)] = user
    made, remarks = {}, []
    for number, (name, nodes) in enumerate(linears.items()):
        if name in others:
            why = f"%{others[name].name} reads its weight too, so it gets no low-rank update"
            remarks.append(Remark("missed", nodes[0].name, why))
            continue
        shape = program.weights[name].shape
        made[name] = LowRank(name, shape, rank, seed * 1_000_003 + number)
        for node in nodes:
            node.target = made[name]
    return made, remarks


def merged_weight(program: Program, name: str, update: LowRank) -> ComputedWeight:
    """Return the merged weight, computed when it is read."""
    source = program.weights[name]
    factors = (TensorWeight(update.down.detach()), TensorWeight(update.up.detach()))

    def merge(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return weight.double() + LowRank.SCALE * (up.double() @ down.double())

    return ComputedWeight("low-rank", (source, *factors), source.shape, source.dtype, merge)
