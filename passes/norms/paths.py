"""Which way a norm's output goes: to queries and keys, to values, to an MLP or to the head."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, fx

from ...ir import (
    Attention,
    ComputedWeight,
    Linear,
    Norm,
    Program,
    block_of,
    insert_call,
    is_weight,
    mark,
    marks_of,
)
from ...ir.calls import argument, aten
from ..training.switches import SWITCH
from .gains import bias_name, hand_on

PART = "part"
"""The mark of a linear that is a part of one: ``count of weight``, that one's."""

Path = Literal["mlp", "query-key", "value", "final"]
ORDER: tuple[Path, ...] = ("mlp", "query-key", "value", "final")


@dataclass(frozen=True, slots=True)
class Paths:
    """The linears of a graph that make the inputs of its attentions."""

    query_key: frozenset[fx.Node]
    value: frozenset[fx.Node]

    @classmethod
    def of(cls, graph: fx.Graph) -> Paths:
        """Follow every attention's inputs back to the linears they come from."""
        query_key: set[fx.Node] = set()
        value: set[fx.Node] = set()
        for node in graph.nodes:
            if (attention := Attention.match(node)) is not None:
                query_key |= _linears_behind(attention.query) | _linears_behind(attention.key)
                value |= _linears_behind(attention.value)
        return cls(frozenset(query_key), frozenset(value))

    def path(self, linear: fx.Node) -> Path:
        """Return the path that a reader of a norm belongs to; a fused one is query and key."""
        if linear in self.query_key:
            return "query-key"
        if linear in self.value:
            return "value"
        return "final" if block_of(linear) is None else "mlp"


def _behind(node: fx.Node) -> set[fx.Node]:
    """Return the calls that a value is made of, back to linears, which are among them."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        one = todo.pop()
        if one in seen or one.op != "call_function":
            continue
        seen.add(one)
        if not Linear.match(one):
            todo += one.all_input_nodes
    return seen


def _linears_behind(node: fx.Node) -> set[fx.Node]:
    return {one for one in _behind(node) if Linear.match(one)}


def split_fused(program: Program, graph: fx.Graph) -> list[fx.Node]:
    """Give the values a linear of their own where one linear makes queries, keys and values.

    ``split(W x + b, n)`` becomes one linear of the rows before the values and one of the values'
    rows; the same numbers.  Returns the new value linears.  What is not cut into equal parts along
    the last dimension, such as heads that interleave, stays as it is.  ``rejoin`` undoes it.
    """
    paths = Paths.of(graph)
    made = []
    rows: dict[tuple[str, tuple[int, int]], str] = {}
    for node in [node for node in graph.nodes if node in paths.query_key & paths.value]:
        parts = _parts(node)
        if parts is not None and (value := _value_part(graph, parts)) is not None:
            made.append(_split(program, graph, node, parts, value, rows))
    return made


def _parts(node: fx.Node) -> list[fx.Node] | None:
    """Return the equal parts that a linear's output is cut into, if that is all that reads it."""
    linear = Linear.match(node)
    if linear is None or not is_weight(linear.weight) or len(node.users) != 1:
        return None
    (cut,) = node.users
    if cut.target not in (aten.split.Tensor, aten.chunk.default):
        return None
    dim = int(argument(cut, 2, "dim", 0))
    if dim not in (-1, node.meta["val"].dim() - 1):
        return None
    values = cut.meta["val"]
    width = int(node.meta["val"].shape[-1])
    if any(int(value.shape[-1]) * len(values) != width for value in values):
        return None
    parts: list[fx.Node | None] = [None] * len(values)
    for user in cut.users:
        parts[int(argument(user, 1, "index"))] = user
    return [part for part in parts if part is not None] if None not in parts else None


def _value_part(graph: fx.Graph, parts: list[fx.Node]) -> int | None:
    """Return which part alone becomes the values."""
    reached: set[int] = set()
    others: set[int] = set()
    for node in graph.nodes:
        if (attention := Attention.match(node)) is not None:
            reached |= _among(parts, _behind(attention.value))
            others |= _among(parts, _behind(attention.query) | _behind(attention.key))
    return reached.pop() if len(reached) == 1 and not reached & others else None


def _among(parts: list[fx.Node], nodes: set[fx.Node]) -> set[int]:
    return {number for number, part in enumerate(parts) if part in nodes}


def _split(
    program: Program,
    graph: fx.Graph,
    node: fx.Node,
    parts: list[fx.Node],
    value: int,
    made_rows: dict[tuple[str, tuple[int, int]], str],
) -> fx.Node:
    """Replace a fused linear by one for each part; queries and keys keep one if they are first."""
    linear = Linear.match(node)
    assert linear is not None
    (cut,) = node.users
    made: list[fx.Node] = []
    size = int(node.meta["val"].shape[-1]) // len(parts)
    for number, part in enumerate(parts):
        rows = (number * size, (number + 1) * size)
        weights = [
            None if source is None else _rows(program, source, rows, node, made_rows)
            for source in (linear.weight, linear.bias)
        ]
        new = insert_call(
            graph, aten.linear.default, (linear.input, *weights), before=node, like=node
        )
        mark(new, PART, f"{len(parts)} of {linear.weight.target}")
        part.replace_all_uses_with(new)
        made.append(new)
    for dead in (*parts, cut, node):
        graph.erase_node(dead)
    return made[value]


def _rows(
    program: Program,
    source: fx.Node,
    rows: tuple[int, int],
    before: fx.Node,
    made: dict[tuple[str, tuple[int, int]], str],
) -> fx.Node:
    """Return some rows of a weight; linears that share it share them, too."""
    key = str(source.target), rows
    if key in made:
        return program.weight_node(before.graph, made[key], before=before)
    weight, name = program.weight(source), f"{source.target}.rows{rows[0]}"
    first, last = rows

    def cut(whole: Tensor) -> Tensor:
        return whole[first:last]

    shape = (last - first, *weight.shape[1:])
    part = ComputedWeight(f"rows {first} {last}", (weight,), shape, weight.dtype, cut)
    made[key] = program.add_weight(name, part)
    return program.weight_node(before.graph, made[key], before=before)


def path_of_norm(graph: fx.Graph, norm: Norm) -> Path:
    """Return the first of the paths, in the order they are frozen, that read a norm."""
    paths = Paths.of(graph)
    return min((_path(paths, norm, user) for user in norm.node.users), key=ORDER.index)


def separate(graph: fx.Graph, norm: Norm) -> None:
    """Give each path that reads a norm a norm of its own, with the same gain and bias."""
    paths = Paths.of(graph)
    readers: dict[Path, list[fx.Node]] = {}
    for user in list(norm.node.users):
        readers.setdefault(_path(paths, norm, user), []).append(user)
    for path in [path for path in ORDER if path in readers][1:]:
        copy = insert_call(
            graph,
            norm.node.target,
            tuple(norm.node.args),
            dict(norm.node.kwargs),
            before=norm.node.next,
            like=norm.node,
        )
        hand_on(norm.node, copy)
        for user in readers[path]:
            user.replace_input_with(norm.node, copy)


def rejoin(program: Program, graph: fx.Graph) -> None:
    """Make norms with the same input, gain and bias one again, and linears that one was split into.

    Those stay apart whose inputs differ by now, and norms that wait for ``heal``.
    """
    seen: dict[tuple[object, ...], fx.Node] = {}
    for node in list(graph.nodes):
        norm = Norm.match(node)
        if norm is None or SWITCH in marks_of(node):
            continue
        names = tuple(part and part.target for part in (norm.gain, norm.bias))
        first = seen.setdefault((node.target, norm.input, norm.eps, *names), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
    wholes: dict[tuple[str, fx.Node, bool], list[Linear]] = defaultdict(list)
    for node in graph.nodes:
        linear, text = Linear.match(node), marks_of(node).get(PART)
        if linear is not None and text is not None:
            wholes[text, linear.input, linear.bias is None].append(linear)
            mark(node, PART, None)
    made: dict[tuple[str, ...], str] = {}
    for (text, _, _), parts in wholes.items():
        count, _, name = text.partition(" of ")
        if len(parts) == int(count):
            _join(program, name, parts, made)


def _join(
    program: Program, name: str, parts: list[Linear], made_weights: dict[tuple[str, ...], str]
) -> None:
    """Replace linears with one input by one, whose output is cut into theirs.

    Those that share their weights share the joined ones, too.
    """
    first = parts[0]
    graph, place = first.node.graph, first.node

    def joined(sources: list[fx.Node], name: str) -> fx.Node:
        key = tuple(str(source.target) for source in sources)
        if key in made_weights:
            return program.weight_node(graph, made_weights[key], before=place)
        rows = [program.weight(source) for source in sources]
        shape = (sum(row.shape[0] for row in rows), *rows[0].shape[1:])
        whole = ComputedWeight("join rows", rows, shape, rows[0].dtype, _stacked)
        made_weights[key] = program.add_weight(name, whole)
        return program.weight_node(graph, made_weights[key], before=place)

    call = partial(insert_call, graph, before=place, like=place)
    weight = joined([part.weight for part in parts], f"{name}.joined")
    biases = [part.bias for part in parts if part.bias is not None]
    bias = joined(biases, f"{bias_name(name)}.joined") if biases else None
    size = int(place.meta["val"].shape[-1])
    linear = call(aten.linear.default, (first.input, weight, bias))
    cut = call(aten.split.Tensor, (linear, size, -1))
    made = [call(operator.getitem, (cut, number)) for number in range(len(parts))]
    for part, new in zip(parts, made, strict=True):
        part.node.replace_all_uses_with(new)
        graph.erase_node(part.node)


def _stacked(*rows: Tensor) -> Tensor:
    return torch.cat(rows)


def _path(paths: Paths, norm: Norm, user: fx.Node) -> Path:
    if Linear.match(user):
        return paths.path(user)
    return "final" if block_of(norm.node) is None else "mlp"
