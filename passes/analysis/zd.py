"""Z-score distribution: how many of a block's weights are much larger than the others."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, fx

from ...ir import Linear, PassError, Program, Weight, fingerprint
from ...ir.quant import row_tiles
from ..tying.stacks import find_stacks
from .block_influence import BlockScores

Sided = Literal["one", "two"]
_FEW = 1e-12  # of the mean square: below it, a spread is rounding


def zd(
    program: Program, graph: str | None = None, *, sided: Sided = "one", pooled: bool = True
) -> BlockScores:
    """Measure ``ZD(l) = #{k: z_k > 1} / #weights`` of every block; no text is needed.

    With z_k = (w_k - mean(w)) / std(w) over the numbers w of all linears of the block: norms and
    biases are left out, and those that make a decoder's cross-attention keys and values in the
    encoder's graph are in.  Scores are 0 to 1, and a *high* one is unimportant.  ``w -> a w + c``
    changes no score, with a > 0 where only large numbers count, with a != 0 where both ends do.
    Sums in float64, a few rows at a time.

    Args:
        program: whose blocks to score; before it is quantised.
        graph: which graph; None for the only one.
        sided: ``one`` counts z > 1, ``two`` counts abs(z) > 1.
        pooled: take mean and deviation over all numbers of the block; else over each matrix by
            itself, and the mean of the matrices' shares.

    Raises:
        PassError: weights are not finite.

    Source: Layer-Wise Quantization (arXiv 2406.17415).  Which numbers are pooled, and that one side
    counts, is a reconstruction.
    """
    name = next(iter(program.graphs)) if graph is None else graph
    scores = []
    stacks = [stack for stack in find_stacks(program) if stack.graph == name]
    for nodes in (stack.nodes(index) for stack in stacks for index in range(len(stack.blocks))):
        weights = [program.weight(weight) for weight in linear_weights(nodes)]
        groups = [weights] if pooled else [[weight] for weight in weights]
        shares = [share_above(group, sided) for group in groups]
        scores.append(sum(shares) / len(shares) if weights else float("nan"))
    return BlockScores(tuple(scores), name, 0, fingerprint(program))


def linear_weights(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """Return the names of the weights of the linears among some calls, each once."""
    found = [linear.weight for node in nodes if (linear := Linear.match(node)) is not None]
    return tuple(dict.fromkeys(str(node.target) for node in found if node.op == "get_attr"))


def share_above(weights: Iterable[Weight], sided: Sided) -> float:
    """Return which share of the numbers of some matrices lies more than one deviation out.

    Raises:
        PassError: some are not finite.
    """
    loaded = tuple(weights)
    count = sum(weight.shape[0] * weight.shape[1] for weight in loaded)
    total = sum(float(rows.sum()) for rows in _tiles(loaded))
    mean = total / count
    spread = sum(float((rows - mean).square().sum()) for rows in _tiles(loaded)) / count
    if not math.isfinite(spread):
        raise PassError("weights are not finite", remedy="mend or replace them")
    if spread <= _FEW * mean**2:
        return 0.0
    deviation = spread**0.5
    beyond = 0
    for rows in _tiles(loaded):
        z = (rows - mean) / deviation
        beyond += int(((z if sided == "one" else z.abs()) > 1).sum())
    return beyond / count


def _tiles(weights: Iterable[Weight]) -> Iterable[Tensor]:
    for weight in weights:
        tensor = weight.load()
        for rows in row_tiles(*tensor.shape):
            yield tensor[rows].to(torch.float64)
