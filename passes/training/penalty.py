"""The term of the loss that keeps the residual stream's deviation the same for all tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from ...ir import Program, find_blocks
from ...ir.config import end_tokens
from ..analysis.norm_deviations import usual_tokens


def deviation_penalty(
    program: Program, trainee: Program, weight: float
) -> Callable[[Tensor], tuple[Callable[[fx.Node, Any], None], Callable[[], Tensor]]] | None:
    """Return what adds ``weight * mean_t (s_t - mean(s))**2`` to a loss; None without blocks.

    With s_t the deviation of token t over the width of the residual stream behind the last block,
    ``sqrt(var + 1e-5)``; the mean leaves out first positions and end-of-text tokens, and is not
    differentiated.

    Args:
        program: says what the end-of-text tokens are.
        trainee: the copy of it that is trained.
        weight: of the term.

    Source: arXiv 2507.02559, the auxiliary loss.
    """
    blocks = [block for graph in trainee.graphs.values() for block in find_blocks(graph)]
    if not blocks or blocks[-1].output is None:
        return None
    place, ends = blocks[-1].output, end_tokens(program.config)

    def begin(tokens: Tensor) -> tuple[Callable[[fx.Node, Any], None], Callable[[], Tensor]]:
        held: list[Tensor] = []

        def observe(node: fx.Node, value: Any) -> None:
            if node is place:
                held.append(value)

        def penalty() -> Tensor:
            deviation = (held[-1].var(-1, correction=0) + 1e-5).sqrt()
            mean = deviation[usual_tokens(tokens, ends)].mean().detach()
            return weight * (deviation - mean).square().mean()

        return observe, penalty

    return begin
