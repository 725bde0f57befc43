"""Which share of the learning rate each weight gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ...ir import Linear, Program, QuantizedLinear, find_blocks, is_weight
from ..outputs import batches, predictions, token_batch
from ..probes import Inputs

aten = torch.ops.aten
_PRODUCTS = (aten.mul.Tensor, aten.mm.default, aten.bmm.default, aten.matmul.default)


def depth_shares(program: Program, decay: float) -> dict[str, float]:
    """Return each weight's share of the rate: ``decay`` for every block between it and the end.

    What is read before the first block has ``decay ** blocks``, what is read behind the last 1.  A
    weight that is read in several places has the largest of their shares.
    """
    shares: dict[str, float] = {}
    for node, share in call_shares(program, decay).items():
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                name = str(source.target)
                shares[name] = max(share, shares.get(name, 0.0))
    return shares


def call_shares(program: Program, decay: float) -> dict[fx.Node, float]:
    """Return each call's share of the rate, see ``depth_shares``."""
    shares: dict[fx.Node, float] = {}
    for graph in program.graphs.values():
        blocks = find_blocks(graph)
        depth = {node: block.index for block in blocks for node in block.nodes}
        outside = -1
        for node in graph.nodes:
            if node in depth:
                outside = len(blocks) - 1  # whatever comes after a block is behind them all
            shares[node] = decay ** (len(blocks) - 1 - depth.get(node, outside))
    return shares


def size_shares(program: Program, windows: Tensor, device: str = "cpu") -> dict[str, float]:
    """Return each weight's share of the rate: ``1 / max(1, median |x|)`` of what it multiplies.

    AdamW moves every entry of a weight by about the rate, whatever the entry's size, so a linear's
    results move by the rate times the sum of ``|x|``.  Rates are meant for what norms give, which
    is below 1 for the most part.  Where nothing normalises any more, as behind ``replace-norms`` or
    ``remove-norms``, weights multiply the residual stream itself, which can be a thousand times as
    large, and one step would be the last.  The median is not moved by the few tokens and channels
    that are much larger than the rest.

    Args:
        program: reads tokens.
        windows: to measure on, int64 [windows, length].
        device: where to.
    """
    products = [
        (str(weight.target), x)
        for graph in program.graphs.values()
        for node in graph.nodes
        for weight, x in _products(node)
        if program.weights.is_parameter(str(weight.target))
    ]
    wanted = {x for _, x in products}
    sizes: dict[fx.Node, float] = {}

    def observe(node: fx.Node, value: Any) -> None:
        if node in wanted:
            sizes[node] = max(float(value.abs().median()), sizes.get(node, 0.0))

    def run(inputs: Inputs, graph: str) -> Mapping[str, Tensor]:
        return program.run(inputs, graph, observe, torch.float32, device=device)

    for batch in batches(windows):
        predictions(program, token_batch(program, batch), run)
    shares: dict[str, float] = {}
    for name, x in products:
        share = 1.0 / max(1.0, sizes.get(x, 1.0))
        shares[name] = min(share, shares.get(name, 1.0))
    return shares


def _products(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Return the weights that a call multiplies values with, and the values."""
    if (linear := Linear.match(node)) is not None:
        pairs = [(linear.weight, linear.input)]
    elif (quantized := QuantizedLinear.match(node)) is not None:
        pairs = [(quantized.scales, quantized.input)]
    elif node.target in _PRODUCTS and len(node.all_input_nodes) == 2:
        left, right = node.all_input_nodes
        pairs = [(left, right), (right, left)]
    else:
        return []
    return [(weight, x) for weight, x in pairs if is_weight(weight) and not is_weight(x)]
