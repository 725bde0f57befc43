"""The range of activations on calibration text, as the scale and zero point of fixed codes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ...ir import PassError, Program, call_key
from ...ir.activations import largest_code
from ..context import PassContext, reads_tokens
from ..outputs import observe_graph


def measure_ranges(
    program: Program, inputs: dict[str, Iterable[fx.Node]], context: PassContext
) -> dict[fx.Node, tuple[float, float]]:
    """Return the least and the greatest number of each value, 0 included, on calibration text.

    Args:
        program: reads tokens.
        inputs: the values, by graph.
        context: holds the text.

    Raises:
        PassError: the program reads no tokens, or a value is not finite there.
        DataError: there is no text, and none can be made up.
    """
    if not reads_tokens(program):
        raise PassError(
            f"{program.origin.model} ({program.kind}) reads no tokens, so text gives no range",
            remedy="mode=dynamic needs none",
        )
    windows = context.calibration_tokens(program).tokens
    ranges: dict[fx.Node, tuple[float, float]] = {}
    for graph, nodes in inputs.items():
        wanted = set(nodes)

        def observe(node: fx.Node, value: Any, wanted: set[fx.Node] = wanted) -> None:
            if node in wanted and value.numel():
                low, high = (float(end) for end in value.aminmax())
                before = ranges.get(node, (0.0, 0.0))
                ranges[node] = min(low, before[0]), max(high, before[1])
                _check_finite(node, low, high)

        if wanted:
            observe_graph(program, graph, windows, observe, context, f"ranges of {graph}")
        for node in wanted - set(ranges):
            raise PassError(f"%{call_key(graph, node)}: the calibration text does not reach it")
    return ranges


def _check_finite(node: fx.Node, low: float, high: float) -> None:
    if not torch.tensor([low, high]).isfinite().all():
        raise PassError(
            f"%{node.name} is not finite on the calibration text",
            remedy="use another calibration text, or see with inspect which weights are damaged",
        )


def fixed_codes(low: float, high: float, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale, float32, and zero point, uint8, of codes that cover ``low .. high``, 0 in it.

    >>> fixed_codes(-1.0, 4.1, 8)
    (tensor(0.0200), tensor(50, dtype=torch.uint8))
    """
    scale = torch.tensor((high - low) / largest_code(bits) or 1.0, dtype=torch.float32)
    return scale, torch.tensor(round(-low / float(scale)), dtype=torch.uint8)
