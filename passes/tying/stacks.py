"""Stacks of blocks, and whether two blocks differ in nothing but their weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from ...ir import (
    Block,
    PassError,
    Program,
    QuantizedEmbedding,
    QuantizedLinear,
    Weight,
    block_of,
    call_name,
    find_blocks,
    path_of,
)
from ..compare import same_arguments


@dataclass(frozen=True, slots=True)
class Stack:
    """The blocks of one graph.

    Attributes:
        graph: which one.
        name: module path of their parent, such as ``model.layers``.
        blocks: in order.
        visiting: per block, calls of its modules in other graphs: the encoder graph of an
            encoder-decoder makes the keys and values of the decoder's cross attention.
    """

    graph: str
    name: str
    blocks: tuple[Block, ...]
    visiting: tuple[tuple[fx.Node, ...], ...]

    def nodes(self, index: int) -> tuple[fx.Node, ...]:
        """Return all calls of a block."""
        return self.blocks[index].nodes + self.visiting[index]


def find_stacks(program: Program) -> list[Stack]:
    """Return the stacks of all graphs; graphs without blocks have none."""
    stacks = []
    for name, graph in program.graphs.items():
        blocks = find_blocks(graph)
        if not blocks:
            continue
        others = [g for other, g in program.graphs.items() if other != name]
        calls = [n for g in others for n in g.nodes if n.op == "call_function" and not block_of(n)]
        visiting = tuple(
            tuple(node for node in calls if f"{path_of(node)}.".startswith(f"{block.path}."))
            for block in blocks
        )
        stacks.append(Stack(name, blocks[0].path.rpartition(".")[0], blocks, visiting))
    return stacks


def weight_names(nodes: tuple[fx.Node, ...]) -> tuple[str, ...]:
    """Return the names of the weights that calls read, in order of use."""
    return tuple(
        str(read.target) for node in nodes for read in node.all_input_nodes if read.op == "get_attr"
    )


def match_weights(program: Program, stack: Stack, index: int, source: int) -> dict[str, str]:
    """Return the name of each weight of one block, and of its counterpart in another.

    Raises:
        PassError: the blocks are not interchangeable; the message says where they differ.
    """
    matcher = _Matcher(program, stack, index, source)
    if reason := matcher.difference():
        own, other = (stack.blocks[i].key for i in (index, source))
        raise PassError(
            f"{own} cannot read the weights of {other}: {reason}",
            remedy="choose another unique= or init=, so that only blocks of one kind share weights",
        )
    return matcher.names


class _Matcher:
    """Walks two blocks side by side.

    Whole numbers that are made from sizes are compared by what they are, not by who makes them:
    blocks share the calls that make them.
    """

    def __init__(self, program: Program, stack: Stack, index: int, source: int) -> None:
        self.program = program
        self.lefts, self.rights = (
            [node for node in stack.nodes(i) if not _is_size(node)] for i in (index, source)
        )
        self.inside = {*self.lefts, *self.rights}
        self.streams = (stack.blocks[index].input, stack.blocks[source].input)
        self.partner: dict[fx.Node, fx.Node] = {}
        self.names: dict[str, str] = {}

    def difference(self) -> str:
        """Return where the blocks differ; empty where they do not."""
        if None in self.streams:
            return "one of them does not read and write one residual value"
        for x, y in zip(self.lefts, self.rights, strict=False):
            if x.target != y.target:
                return f"%{x.name} calls {call_name(x)}, and %{y.name} {call_name(y)}"
            differing: list[str] = []
            if not same_arguments(x, y, partial(self._same, differing)):
                return f"%{x.name} {differing[0] if differing else f'differs from %{y.name}'}"
            self.partner[x] = y
        if len(self.lefts) != len(self.rights):
            return f"it has {len(self.lefts)} calls, and the other {len(self.rights)}"
        if len(set(self.names.values())) != len(self.names):
            return "it reads two weights where the other reads one twice"
        return ""

    def _same(self, differing: list[str], x: fx.Node, y: fx.Node) -> bool:
        if "get_attr" in (x.op, y.op):
            same = x.op == y.op and self._same_weight(x, y)
        elif x in self.partner:
            same = self.partner[x] is y
        else:
            same = (x, y) == self.streams or self._same_outside(x, y)
        if not same:
            own, other = (f"@{n.target}" if n.op == "get_attr" else f"%{n.name}" for n in (x, y))
            differing.append(f"reads {own} where the other reads {other}")
        return same

    def _same_outside(self, x: fx.Node, y: fx.Node) -> bool:
        """Whether two values from outside are the same, or made alike from the two caches."""
        if x is y:
            return True
        if _is_size(x) or _is_size(y):
            return str(x.meta["val"]) == str(y.meta["val"])
        if x in self.inside or y in self.inside or x.op != y.op:
            return False
        if x.op == "placeholder":
            return _is_cache(x, y)
        if x.op == "get_attr":
            own, other = self.program.weight(x), self.program.weight(y)
            return _alike(own, other) and torch.equal(own.load(), other.load())
        return x.target == y.target and same_arguments(x, y, self._same_outside)

    def _same_weight(self, x: fx.Node, y: fx.Node) -> bool:
        """Whether one weight can stand for another: one type, and one content if it is a table."""
        own, other = self.program.weight(x), self.program.weight(y)
        if (
            not _alike(own, other)
            or self.names.setdefault(str(x.target), str(y.target)) != y.target
        ):
            return False  # of other types, or one weight where the other block reads two
        if x.target == y.target or own.dtype.is_floating_point or _is_codes(x):
            return True
        return torch.equal(own.load(), other.load())  # a mask, for instance


def _alike(a: Weight, b: Weight) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _is_size(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), torch.Tensor | tuple | list)


def _is_codes(node: fx.Node) -> bool:
    return any(QuantizedLinear.match(u) or QuantizedEmbedding.match(u) for u in node.users)


def _is_cache(x: fx.Node, y: fx.Node) -> bool:
    """Whether two inputs are the same part of two blocks' caches."""
    own, other = (re.sub(r"\.\d+\.", ".N.", str(node.target)) for node in (x, y))
    same_type = x.meta["val"].dtype == y.meta["val"].dtype
    return own == other and ".N." in own and same_type
