"""Quantised calls in the place of linears and embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir import (
    Embedding,
    Linear,
    Program,
    QuantizedEmbedding,
    QuantizedLinear,
    insert_call,
)
from ..compare import Same
from .outliers import Outliers
from .readers import Shared
from .store import Stored, held


def put_stored(program: Program, shared: Shared, stored: Stored) -> list[fx.Node]:
    """Make every reader of a weight read its codes instead; return the new calls."""
    names = {
        part: program.add_weight(f"{shared.name}.{part}", value)
        for part in ("codes", "scales", "zeros")
        if (value := getattr(stored, part)) is not None
    }
    return [_rewrite(program, graph, node, names, stored) for graph, node in shared.readers]


def _rewrite(
    program: Program,
    graph: fx.Graph,
    node: fx.Node,
    names: dict[str, str],
    stored: Stored,
) -> fx.Node:
    """Put the quantised call in the place of ``node``."""
    parts = [
        program.weight_node(graph, names[part], before=node) if part in names else None
        for part in ("codes", "scales", "zeros")
    ]
    numbers = (stored.qtype.bits, stored.qtype.group_size, stored.in_features)
    ops: Any = torch.ops.modelathe
    # matched only now: the input may be a call that was replaced a moment ago
    if linear := Linear.match(node):
        target, args = ops.quantized_linear.default, (linear.input, *parts, linear.bias, *numbers)
    elif embedding := Embedding.match(node):
        target, args = ops.quantized_embedding.default, (embedding.ids, *parts, *numbers)
    else:
        raise AssertionError(f"%{node.name} is neither a linear nor an embedding")
    new = insert_call(graph, target, args, before=node, like=node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def put_beside(program: Program, shared: Shared, outliers: Outliers, calls: list[fx.Node]) -> None:
    """Add the products with a weight's outliers to its quantised calls."""
    names = [
        program.add_weight(f"{shared.name}.outlier_{part}", held(value))
        for part, value in outliers.parts().items()
    ]
    for (graph, _), call in zip(shared.readers, calls, strict=True):
        _add(program, graph, call, names, outliers)


def _add(
    program: Program, graph: fx.Graph, node: fx.Node, names: list[str], outliers: Outliers
) -> None:
    call = QuantizedLinear.match(node)
    assert call is not None
    after = node.next
    parts = [program.weight_node(graph, name, before=after) for name in names]
    ops: Any = torch.ops
    target, args = ops.modelathe.sparse_linear.default, (call.input, *parts)
    if outliers.counts is None:
        values, columns = parts
        picked = insert_call(
            graph, ops.aten.index_select.default, (call.input, -1, columns), before=after, like=node
        )
        target, args = ops.aten.linear.default, (picked, values)
    beside = insert_call(graph, target, args, before=after, like=node)
    users = list(node.users)
    whole = insert_call(graph, ops.aten.add.Tensor, (node, beside), before=after, like=node)
    for user in users:
        user.replace_input_with(node, whole)


def is_quantized(old: fx.Node, new: fx.Node, same: Same) -> bool:
    """Tell whether ``new`` is ``old`` with a quantised weight: same input, same bias."""
    if (linear := Linear.match(old)) and (call := QuantizedLinear.match(new)):
        if linear.bias is None or call.bias is None:
            return same(linear.input, call.input) and linear.bias is call.bias
        return same(linear.input, call.input) and same(linear.bias, call.bias)
    if (embedding := Embedding.match(old)) and (rows := QuantizedEmbedding.match(new)):
        return same(embedding.ids, rows.ids)
    return False


def weight_of(node: fx.Node) -> str:
    """Return the name of the weight of a linear or embedding."""
    call = Linear.match(node) or Embedding.match(node)
    assert call is not None
    return str(call.weight.target)


def quantized_call(node: fx.Node) -> QuantizedLinear | QuantizedEmbedding:
    """Return the view of a quantised linear or embedding."""
    call = QuantizedLinear.match(node) or QuantizedEmbedding.match(node)
    assert call is not None
    return call
