"""Channels that can be scaled where they are made and scaled back where they are read.

Numbered are the rows of linears and the gains of norms, which make channels, and the columns of
linears, which read them.  Numbers that must have one scale share a label: a column and what it
reads, heads of a query and the value head that they share, all depths that read one weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ...ir import Attention, Embedding, Linear, Norm, Program, QuantizedLinear, is_weight
from ...ir.calls import aten
from ..cache.channels import (
    Channels,
    components,
    distinct,
    known,
    number_last,
    shape_of,
)
from ..cache.entries import Entries, Part
from ..canonical.match import is_call
from ..canonical.places import constant_along, is_move
from ..norms.readers import has_weights, named

_HOMOGENEOUS = (aten.relu.default, aten.leaky_relu.default)  # f(s x) = s f(x) for s > 0
_MUL = (aten.mul.Tensor,)
Key = tuple[str, ...]


class _Followed(Channels):
    """Where scaled channels go until linears read them.

    Beside what ``Channels`` passes: attention hands the channels of values on, a product of two
    followed values those of the second, for one scale is enough.  Sums fix both of their sides.
    What a linear reads it scales back with its columns.
    """

    __slots__ = ()
    part: ClassVar[Part] = "value"

    def _make(self, node: fx.Node) -> None:
        """Columns of linears, and what norms read, are joined or fixed by ``ScaledChannels``."""

    def _pass(self, node: fx.Node, joins: set[fx.Node]) -> None:
        if is_call(node, _HOMOGENEOUS):
            self.ids[node] = self.ids[node.all_input_nodes[0]]
        else:
            super()._pass(node, joins)

    def _factor(self, node: fx.Node) -> Any:
        first, second = node.args[:2]
        if is_call(node, _MUL) and first in self.ids and second in self.ids:
            self._fix(node, first)  # type: ignore[arg-type]
            return self.ids[second]  # type: ignore[index]
        return super()._factor(node)

    def _add(self, node: fx.Node) -> None:
        self._fix(node, *node.all_input_nodes)

    def _attend(self, attention: Attention) -> None:
        others = [n for n in (attention.query, attention.key, attention.mask) if n is not None]
        self._fix(attention.node, *others)
        self._average(attention.node, attention.value)

    def _multiply(self, node: fx.Node) -> None:
        first, second = node.args[:2]
        assert isinstance(first, fx.Node)
        assert isinstance(second, fx.Node)
        if first in self.ids:
            self._fix(node, first, second)
        else:
            self._average(node, second)

    def _average(self, node: fx.Node, value: fx.Node) -> None:
        """Hand on the last axis of ``value`` [..., rows, channels], whose rows a product sums."""
        ids = self.ids.get(value)
        if ids is None:
            return
        kept = constant_along(ids, (ids.dim() - 2,)) if ids.dim() > 2 else None
        shape = shape_of(node)
        if kept is None or len(shape) != ids.dim():
            self._fix(node, value)
            return
        kept = kept.unsqueeze(-2)
        if ids.dim() == 4:  # grouped heads
            kept = kept.repeat_interleave(shape[1] // kept.shape[1], 1)
        self.ids[node] = kept.expand(shape)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Linears whose columns are scaled together, and what makes the channels that they read.

    Attributes:
        makers: norms and linears that are scaled by the inverse.
        readers: the linears, in graph order.
        labels: of the channels, ascending; one scale each.
    """

    makers: tuple[Norm | Linear, ...]
    readers: tuple[Linear, ...]
    labels: Tensor


@dataclass(slots=True)
class ScaledChannels:
    """All channels of a program.

    Attributes:
        norms: those with a gain that can be scaled, or that could have one.
        linears: those with weights of their own.
        first: what is numbered to its first number: the rows or columns of a weight, a gain.
        count: how many numbers there are.
        labels: int64 [count]; equal for numbers that share a scale.
        free: bool [count]; whether a number may be scaled.
    """

    norms: list[Norm] = field(default_factory=list)
    linears: list[Linear] = field(default_factory=list)
    first: dict[Key, int] = field(default_factory=dict)
    count: int = 0
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    free: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    _fixed: list[tuple[Tensor, fx.Node]] = field(default_factory=list)

    @classmethod
    def of(cls, program: Program) -> ScaledChannels:
        """Number the channels of a program, follow them, and label them."""
        found = cls()
        for name, graph in program.graphs.items():
            found._number(name, graph)
        equal = [torch.empty(2, 0, dtype=torch.int64)]
        for name, graph in program.graphs.items():
            equal += found._follow(program, name, graph)
        found._fixed += found._read_otherwise(program)
        labels = found.labels = components(found.count, torch.cat(equal, 1))
        free = torch.ones(found.count, dtype=torch.bool)
        for ids, _ in found._fixed:
            free[labels[ids]] = False
        for numbers in (map(found.made, found.makers), map(found.read, found.linears)):
            met = torch.zeros_like(free)
            for ids in numbers:
                met[labels[ids]] = True
            free &= met
        found.free = free[labels]
        return found

    @property
    def makers(self) -> list[Norm | Linear]:
        """Norms and linears."""
        return [*self.norms, *self.linears]

    def made(self, maker: Norm | Linear) -> Tensor:
        """Return the numbers of the channels that a norm or linear makes, in order."""
        key = _gain(maker) if isinstance(maker, Norm) else ("rows", str(maker.weight.target))
        size = maker.sizes[0] if isinstance(maker, Norm) else _sizes(maker)[0]
        return torch.arange(self.first[key], self.first[key] + size)

    def read(self, linear: Linear) -> Tensor:
        """Return the numbers of the columns of a linear."""
        first = self.first["columns", str(linear.weight.target)]
        return torch.arange(first, first + _sizes(linear)[1])

    def pairs(self) -> list[Pair]:
        """Return what can be scaled, in graph order; each free label is in one pair."""
        edges = [torch.empty(2, 0, dtype=torch.int64)]
        for linear in self.linears:
            own = self._free(self.read(linear))
            edges.append(torch.stack([own[:-1], own[1:]]))
        together = components(self.count, torch.cat(edges, 1))
        readers: dict[int, list[Linear]] = {}
        for linear in self.linears:
            for first in self._free(self.read(linear))[:1]:
                readers.setdefault(int(together[first]), []).append(linear)
        makers: dict[int, list[Norm | Linear]] = {}
        for maker in self.makers:
            for pair in distinct(together[self._free(self.made(maker))]).tolist():
                makers.setdefault(pair, []).append(maker)
        return [
            Pair(
                tuple(makers[pair]),
                tuple(linears),
                distinct(torch.cat([self._free(self.read(linear)) for linear in linears])),
            )
            for pair, linears in readers.items()
        ]

    def obstacle(self, linear: Linear) -> str:
        """Return why no column of a linear can be scaled."""
        columns = self.labels[self.read(linear)]
        for ids, node in self._fixed:
            if not bool(torch.isin(self.labels[ids], columns).any()):
                continue
            if QuantizedLinear.match(node) and node is not linear.input:
                return f"%{node.name} is quantised already: equalise before quantising"
            if node is linear.input:
                return f"its input comes from {_origin(node)}"
            if Embedding.match(node):
                return f"its weight is also that of {named(node)}"
            if node.op == "output":
                return "its channels are an output of the graph, too"
            return f"its channels also reach {named(node)}"
        return "nothing makes its input that could be scaled"

    def _free(self, numbers: Tensor) -> Tensor:
        """Return the labels of those numbers that may be scaled."""
        return self.labels[numbers[self.free[numbers]]]

    def _number(self, name: str, graph: fx.Graph) -> None:
        for node in graph.nodes:
            linear, norm = Linear.match(node), Norm.match(node)
            if linear is not None and _is_plain(linear):
                self.linears.append(linear)
                rows, columns = _sizes(linear)
                self._take(("rows", str(linear.weight.target)), rows)
                self._take(("columns", str(linear.weight.target)), columns)
            elif norm is not None and _has_channels(norm):
                self.norms.append(norm)
                self._take(_gain(norm), norm.sizes[0])

    def _take(self, key: Key, size: int) -> None:
        if key not in self.first:
            self.first[key], self.count = self.count, self.count + size

    def _follow(self, program: Program, name: str, graph: fx.Graph) -> Iterator[Tensor]:
        """Yield the pairs [2, n] of numbers that must share a scale."""
        makers = [maker for maker in self.makers if maker.node.graph is graph]
        sources = {one.node: number_last(one.node, int(self.made(one)[0])) for one in makers}
        # only a decoder's cache is judged after the pass
        entries = Entries.of(program, name) if program.kind == "decoder" else Entries((), {})
        followed = _Followed.follow(graph, sources, entries)
        self._fixed += followed.fixed
        for maker in makers:
            ids = followed.ids.get(maker.input)
            if isinstance(maker, Norm):
                self._fixed += [] if ids is None else [(known(ids), maker.node)]
                continue
            columns = self.read(maker)
            read = None if ids is None else constant_along(ids, tuple(range(ids.dim() - 1)))
            if read is not None:
                yield torch.stack([read, columns])
            else:
                self._fixed.append((columns, maker.input))
                self._fixed += [] if ids is None else [(known(ids), maker.node)]

    def _read_otherwise(self, program: Program) -> Iterator[tuple[Tensor, fx.Node]]:
        """Yield channels whose weight or bias is read by a call that does not scale it alike."""
        readers: dict[str, set[fx.Node]] = {}
        for graph in program.graphs.values():
            for node in graph.find_nodes(op="get_attr"):
                readers.setdefault(str(node.target), set()).update(node.users)
        alike: dict[int, set[fx.Node]] = {}
        for maker in self.makers:
            alike.setdefault(int(self.made(maker)[0]), set()).add(maker.node)
        for maker in self.makers:
            weight = maker.gain if isinstance(maker, Norm) else maker.weight
            own = self.made(maker)
            columns = self.read(maker) if isinstance(maker, Linear) else own[:0]
            for part, channels in ((weight, torch.cat([own, columns])), (maker.bias, own)):
                others = readers[str(part.target)] - alike[int(own[0])] if part else ()
                for other in others:
                    yield channels, other


def _is_plain(linear: Linear) -> bool:
    parts = (linear.weight, linear.bias)
    return has_weights(linear) and linear.input not in parts and len(_sizes(linear)) == 2


def _has_channels(norm: Norm) -> bool:
    """Tell whether a norm is over one axis, with weights of the program or none."""
    parts = [part for part in (norm.gain, norm.bias) if part is not None]
    return len(norm.sizes) == 1 and all(map(is_weight, parts)) and norm.input not in parts


def _sizes(linear: Linear) -> list[int]:
    return [int(size) for size in linear.weight.meta["val"].shape]


def _gain(norm: Norm) -> Key:
    """Return what numbers a norm's channels: its gain, or itself where it has none."""
    if norm.gain is None:
        return ("norm", str(id(norm.node.graph)), norm.node.name)
    return ("gain", str(norm.gain.target))


def _origin(node: fx.Node) -> str:
    """Name what makes a value, behind moves of its entries."""
    while is_move(node) and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    if node.op == "placeholder":
        return f"%{node.name}, an input of the graph"
    quantized = ", which is quantised already" if QuantizedLinear.match(node) else ""
    return f"{named(node)}{quantized}"
