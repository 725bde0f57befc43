"""Matrix products and attention in their canonical form."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...ir import ComputedWeight, Linear, Program, block_of, insert_call
from ...ir.calls import Attention, argument, is_weight
from .match import ADD, aten, is_call, operands, same_sizes, same_type

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def raise_linears(program: Program, graph: fx.Graph) -> list[fx.Node]:
    """Raise ``x W + b`` with W a weight ``[in, out]``, or the transpose of one, to ``linear``.

    A transposed weight is computed when it is read: no copy is made before.
    """
    raised = []
    for node in list(graph.nodes):
        found = _product(node)
        if found is None:
            continue
        source, weight, bias = found
        if not is_weight(weight):
            weight = argument(weight, 0, "self")
        else:
            weight = _transposed(program, graph, weight, before=node)
        call = insert_call(
            graph, aten.linear.default, (source, weight, bias), before=node, like=node
        )
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        raised.append(call)
    return raised


def _product(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Match ``addmm(b, x, W)``, ``mm(x, W)`` and ``matmul(x, W)``; return x, W, b."""
    if is_call(node, aten.addmm.default):
        bias, source, weight = node.args[:3]
        plain = node.kwargs.get("alpha", 1) == 1 and node.kwargs.get("beta", 1) == 1
        if plain and _is_row(bias):
            return _checked(source, weight, bias)
    if is_call(node, (aten.mm.default, aten.matmul.default)):
        return _checked(node.args[0], node.args[1], None)
    return None


_TRANSPOSES = (
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.numpy_T.default,
)


def _is_transposed_weight(node: Any) -> bool:
    """Tell whether a value is a matrix of the program, transposed."""
    if not is_call(node, _TRANSPOSES) or not is_weight(argument(node, 0, "self")):
        return False
    before, after = argument(node, 0, "self").meta["val"].shape, node.meta["val"].shape
    if len(before) != 2 or list(after) != [before[1], before[0]]:
        return False
    swapped = is_call(node, (aten.t.default, aten.numpy_T.default)) or list(node.args[1:]) in (
        [0, 1],
        [1, 0],
        [[1, 0]],
        [-1, -2],
        [-2, -1],
    )
    return swapped and node.args[1:] != ([0, 1],)


def _is_row(bias: Any) -> bool:
    return is_weight(bias) and bias.meta["val"].dim() == 1


def _checked(source: Any, weight: Any, bias: Any) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    if not isinstance(source, fx.Node) or is_weight(source) or source.meta["val"].dim() < 2:
        return None
    matrix = is_weight(weight) and weight.meta["val"].dim() == 2
    return (source, weight, bias) if matrix or _is_transposed_weight(weight) else None


def _transposed(program: Program, graph: fx.Graph, node: fx.Node, *, before: fx.Node) -> fx.Node:
    weight = program.weight(node)
    shape = (weight.shape[1], weight.shape[0])
    name = f"{node.target}.transposed"
    rule = ComputedWeight("transpose", (weight,), shape, weight.dtype, lambda t: t.t(), keep=False)
    if name not in program.weights:
        program.add_weight(name, rule)
    return program.weight_node(graph, name, before=before)


def lift_views(program: Program, graph: fx.Graph) -> int:
    """Let a linear read ``[..., in]`` itself, where views flatten it and restore it after."""
    lifted = 0
    for node in list(graph.nodes):
        linear = Linear.match(node)
        if linear is None or not is_call(linear.input, _VIEWS) or len(node.users) != 1:
            continue
        (after,) = node.users
        source = argument(linear.input, 0, "self")
        if not is_call(after, _VIEWS) or not _restores(source, linear, after):
            continue
        call = insert_call(
            graph,
            aten.linear.default,
            (source, linear.weight, linear.bias),
            before=node,
            like=node,
        )
        after.replace_all_uses_with(call)
        graph.erase_node(after)
        graph.erase_node(node)
        lifted += 1
    return lifted


def _restores(source: fx.Node, linear: Linear, after: fx.Node) -> bool:
    """Tell whether the view after a linear has the source's leading sizes."""
    value, flat, result = source.meta["val"], linear.input.meta["val"], after.meta["val"]
    if str(value.shape[-1]) != str(flat.shape[-1]):
        return False
    wanted = [*map(str, value.shape[:-1]), str(linear.node.meta["val"].shape[-1])]
    return list(map(str, result.shape)) == wanted


def raise_biases(program: Program, graph: fx.Graph) -> list[fx.Node]:
    """Let a linear without a bias ``[out]`` add the one that alone reads it."""
    raised = []
    for node in list(graph.nodes):
        linear = Linear.match(node)
        if linear is None or linear.bias is not None or len(node.users) != 1:
            continue
        (total,) = node.users
        bias = next((other for value, other in operands(total, ADD) if value is node), None)
        if bias is None or not _is_row(bias) or not _is_bias_of(bias, node, total):
            continue
        args = (linear.input, linear.weight, bias)
        call = insert_call(graph, aten.linear.default, args, before=total, like=node)
        total.replace_all_uses_with(call)
        graph.erase_node(total)
        graph.erase_node(node)
        raised.append(call)
    return raised


def _is_bias_of(bias: fx.Node, product: fx.Node, total: fx.Node) -> bool:
    """Tell whether a sum with a row is what the product's linear would give with that bias."""
    row, value = bias.meta["val"], product.meta["val"]
    fits = row.dtype == value.dtype and row.shape[0] == value.shape[-1]
    return fits and same_type(product, total) and block_of(product) == block_of(total)


def raise_grouped_attention(program: Program, graph: fx.Graph) -> list[fx.Node]:
    """Let attention share key and value heads itself, where the model repeats them first."""
    raised = []
    for node in graph.nodes:
        attention = Attention.match(node)
        if attention is None or attention.grouped:
            continue
        key, value = _repeated(attention.key), _repeated(attention.value)
        if key is None or value is None or not _divides(attention.query, key):
            continue
        if not same_sizes(attention.key.meta["val"], attention.value.meta["val"]):
            continue
        node.args = (attention.query, key, value, *node.args[3:])
        node.kwargs = {**node.kwargs, "enable_gqa": True}
        raised.append(node)
    return raised


def _repeated(node: fx.Node) -> fx.Node | None:
    """Match ``[b, g, s, d]`` with each head repeated r times in a row to ``[b, g r, s, d]``."""
    if not is_call(node, _VIEWS):
        return None
    inner = argument(node, 0, "self")
    if is_call(inner, aten.clone.default):
        inner = argument(inner, 0, "self")
    if not is_call(inner, aten.expand.default):
        return None
    single = argument(inner, 0, "self")
    while is_call(single, aten.slice.Tensor) and same_sizes(
        single.meta["val"], argument(single, 0, "self").meta["val"]
    ):
        single = argument(single, 0, "self")
    if not is_call(single, aten.unsqueeze.default) or argument(single, 1, "dim") != 2:
        return None
    source = argument(single, 0, "self")
    shape, wide = source.meta["val"].shape, inner.meta["val"].shape
    if len(shape) != 4 or len(wide) != 5:
        return None
    kept = [*map(str, shape[:2]), *map(str, shape[2:])]
    same = [str(wide[0]), str(wide[1]), str(wide[3]), str(wide[4])] == kept
    result = node.meta["val"].shape
    merged = str(result[1]) == str(wide[1] * wide[2]) and str(result[2]) == str(shape[2])
    return source if same and merged and isinstance(source, fx.Node) else None


def _divides(query: fx.Node, key: fx.Node) -> bool:
    heads, groups = query.meta["val"].shape[1], key.meta["val"].shape[1]
    return isinstance(heads, int) and isinstance(groups, int) and heads % groups == 0
