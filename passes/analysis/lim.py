"""Layer input modification: how far each block turns the residual stream."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...ir import PassError, Program, find_blocks, fingerprint
from ..context import PassContext
from .block_influence import BlockScores, compare_ends, token_cosines

Aggregation = Literal["flatten", "token-mean"]


def lim(
    program: Program,
    context: PassContext,
    graph: str | None = None,
    *,
    agg: Aggregation = "flatten",
    skip_first: bool = False,
) -> BlockScores:
    """Measure ``LIM(l) = -cos(h_in, h_out)`` of every block on the calibration text.

    With h_in, h_out: [..., width] the residual values that block l reads and writes.  ``flatten``
    takes all tokens for one long vector:

        LIM(l) = -sum(h_in * h_out) / sqrt(sum(h_in**2) sum(h_out**2))

    ``token-mean`` is minus the mean of the tokens' cosines, which is block influence less 1.
    Scores are -1 (the block changes nothing, least important) to 1; scaling h_out by any c > 0
    changes none.
    Values are computed in float32, products and sums in float64, a few windows at a time.

    Args:
        program: whose blocks to score; before it is quantised.
        context: holds the calibration text.
        graph: which graph; None for the only one.
        agg: how tokens are put together.
        skip_first: leave out the first token of every window, whose vector is often so long that
            it decides the flattened cosine alone.

    Raises:
        DataError: there is no calibration text, and none can be made up.
        PassError: values are not finite.

    Source: Layer-Wise Quantization (arXiv 2406.17415).  The paper has one vector per block and
    does not say how tokens make it: flattening them is a reconstruction.
    """
    name = next(iter(program.graphs)) if graph is None else graph
    count = len(find_blocks(program.graphs[name]))
    sums = torch.zeros(count, 3, dtype=torch.float64)  # of in * out, in**2, out**2
    means = torch.zeros(count, 2, dtype=torch.float64)  # of cosines, of tokens

    def compare(index: int, before: Tensor, after: Tensor) -> None:
        if skip_first and before.dim() > 2:
            before, after = before[:, 1:], after[:, 1:]
        if agg == "token-mean":
            cosines = token_cosines(before, after)
            means[index, 0] += float(cosines.sum())
            means[index, 1] += cosines.numel()
            return
        sums[index] += moments(before, after).cpu()

    read = compare_ends(program, context, name, compare)
    if not bool(sums.isfinite().all() and means.isfinite().all()):
        raise PassError(
            "the residual stream is not finite on the calibration text",
            remedy="use another calibration text, or see with inspect which weights are damaged",
        )
    found = flat_cosines(sums) if agg == "flatten" else means[:, 0] / means[:, 1]
    scores = tuple(-float(cosine) for cosine in found.clamp(-1.0, 1.0))
    return BlockScores(scores, name, read, fingerprint(program))


def moments(a: Tensor, b: Tensor) -> Tensor:
    """Return the sums of ``a * b``, ``a**2`` and ``b**2`` over all numbers: float64 [3]."""
    a, b = a.double(), b.double()
    return torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()])


def flat_cosines(sums: Tensor) -> Tensor:
    """Return the cosines that ``moments [blocks, 3]`` stand for; nan where nothing was summed."""
    return sums[:, 0] / (sums[:, 1] * sums[:, 2]).sqrt()
