"""Calls that return what they are given, sizes asked twice, and weights computed from weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ...ir import ComputedWeight, Program
from ...ir.calls import argument, is_weight
from .match import aten, is_call, same_type

_COPIES = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten._to_copy.default,
    aten.type_as.default,
    aten.expand.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.slice.Tensor,
)
_NEUTRAL = {aten.mul.Tensor: 1, aten.div.Tensor: 1, aten.add.Tensor: 0, aten.sub.Tensor: 0}
_FOLDABLE = (
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.neg.default,
    aten.exp.default,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten._to_copy.default,
)


def drop_noops(program: Program, graph: fx.Graph) -> int:
    """Replace calls by their input where the value is the same; return how many."""
    dropped = 0
    for node in list(graph.nodes):
        source = _same_value(node) or _lone_part(node)
        if source is not None and same_type(node, source):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            dropped += 1
    return dropped


def _same_value(node: fx.Node) -> fx.Node | None:
    """Return the input that a call copies, if it may copy one."""
    if is_call(node, _COPIES):
        source = argument(node, 0, "self")
        if is_call(node, aten.slice.Tensor) and argument(node, 4, "step", 1) != 1:
            return None
        if is_call(node, aten.dropout.default) and argument(node, 2, "train"):
            return None
        return source if isinstance(source, fx.Node) else None
    if node.op == "call_function" and node.target in _NEUTRAL and len(node.args) == 2:
        source, number = node.args
        neutral = isinstance(number, int | float) and number == _NEUTRAL[node.target]
        return source if neutral and isinstance(source, fx.Node) else None
    return None


def _lone_part(node: fx.Node) -> fx.Node | None:
    """Return the only part of a ``cat`` that is not empty (a cache starts with an empty tensor)."""
    if not is_call(node, aten.cat.default):
        return None
    parts = argument(node, 0, "tensors")
    if not isinstance(parts, list | tuple):
        return None
    full = [part for part in parts if not _empty(part)]
    return full[0] if len(full) == 1 and isinstance(full[0], fx.Node) else None


def _empty(part: Any) -> bool:
    value = part.meta["val"] if isinstance(part, fx.Node) else None
    return isinstance(value, Tensor) and any(isinstance(s, int) and s == 0 for s in value.shape)


def merge_sizes(program: Program, graph: fx.Graph) -> int:
    """Let equal sizes be asked once, of the first input that has them; return how many went.

    Equal means: the same expression of the program's symbolic sizes.  A block that is removed
    later then takes no size away from the others, as long as some input still has it.
    """
    first: dict[str, fx.Node] = {}
    merged = 0
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.SymInt):
            continue
        known = first.setdefault(str(value), node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)
            merged += 1
    return merged


def fold_constants(program: Program, graph: fx.Graph) -> int:
    """Make weights of calls that read weights only, such as a gain written as ``1 + w``."""
    folded = 0
    for node in list(graph.nodes):
        if not is_call(node, _FOLDABLE) or not node.users:
            continue
        sources = node.all_input_nodes
        if not sources or not all(is_weight(source) for source in sources):
            continue
        value = node.meta["val"]
        inputs = [program.weight(source) for source in sources]
        if not value.dtype.is_floating_point or value.numel() > max(w.bytes for w in inputs):
            continue
        short = str(node.target).removeprefix("aten.").partition(".")[0]
        rule = f"{node.target} {_argument_text(node, sources)}"
        weight = ComputedWeight(
            rule, inputs, tuple(value.shape), value.dtype, _evaluator(node, sources)
        )
        name = program.add_weight(f"{sources[0].target}.{short.strip('_')}", weight)
        node.replace_all_uses_with(program.weight_node(graph, name, before=node))
        graph.erase_node(node)
        folded += 1
    return folded


def _argument_text(node: fx.Node, sources: list[fx.Node]) -> str:
    return str(fx.node.map_arg((node.args, node.kwargs), lambda n: f"#{sources.index(n)}"))


def _evaluator(node: fx.Node, sources: list[fx.Node]) -> Any:
    """Return a function of the inputs' tensors that does what ``node`` does."""
    target, args, kwargs = node.target, node.args, node.kwargs
    assert callable(target)

    def evaluate(*tensors: Tensor) -> Tensor:
        table = dict(zip(sources, tensors, strict=True))
        given = fx.node.map_arg((args, kwargs), table.__getitem__)
        # a computed weight is rounded once, at its end: a call in the middle never narrows
        given = fx.node.map_aggregate(given, lambda a: _not_below(a, tensors[0].dtype))
        result: Tensor = target(*given[0], **given[1])
        return result

    return evaluate


def _not_below(argument: Any, dtype: torch.dtype) -> Any:
    if isinstance(argument, torch.dtype) and argument.is_floating_point:
        return torch.promote_types(argument, dtype)
    return argument
