"""Which channels of keys and queries must share a scale, found by following them through a graph.

Scale channel c of a linear's output by s[c].  Calls that move, negate or multiply channels hand the
scale on; a sum asks that both of its sides have one scale; a product of queries with keys asks that
their scales cancel.  Rotary positions make the two channels of a pair share one scale, and leave
channels alone that are not turned.  What meets any other call must not be scaled at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ...ir import Attention, Rotary
from ...ir.calls import aten
from ...ir.ops import pairs
from ..canonical.match import is_call
from ..canonical.places import FOREIGN, is_move
from .entries import Entries, Part

_SAME = (
    aten.neg.default,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
)
_MOVES = (aten.flatten.using_ints, aten.repeat.default)
_TIMES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
_PLUS = (aten.add.Tensor, aten.sub.Tensor)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)

Ids = Tensor  # int64, the number of the channel that each entry scales with; FOREIGN: with none


@dataclass(slots=True)
class Channels:
    """What was found out about numbered channels.

    Attributes:
        count: how many there are.
        ids: node to the channel of each entry, symbolic sizes being 1; a tuple for several results.
        equal: pairs of channels that share a scale, [2, pairs] each.
        inverse: pairs of a query's and a key's channel whose scales cancel, likewise.
        fixed: channels that must not be scaled, and the call that is why.
        part: of the cache, whose entries hand channels on.
    """

    part: ClassVar[Part] = "key"

    count: int
    ids: dict[fx.Node, Any]
    equal: list[Tensor] = field(default_factory=list)
    inverse: list[Tensor] = field(default_factory=list)
    fixed: list[tuple[Tensor, fx.Node]] = field(default_factory=list)

    @classmethod
    def follow(cls, graph: fx.Graph, sources: Mapping[fx.Node, Ids], entries: Entries) -> Channels:
        """Follow channels from where they are made to the end of the graph.

        Args:
            graph: the graph.
            sources: node to the number of each entry of it, as ``number_last`` makes them.
            entries: the cache's; past ones of ``part`` scale as new ones do.
        """
        count = 1 + max((int(ids.max()) for ids in sources.values()), default=-1)
        found = cls(count, dict(sources))
        joins = {entry.join for entry in entries.found if entry.part == cls.part}
        for node in graph.nodes:
            if not any(n in found.ids for n in node.all_input_nodes):
                continue
            if node in sources:
                found._make(node)
            else:
                found._pass(node, joins)
        return found

    def _make(self, node: fx.Node) -> None:
        """Take in that channels are made of others: what a source reads is not scaled back."""
        self._fix(node, *node.all_input_nodes)

    def _pass(self, node: fx.Node, joins: set[fx.Node]) -> None:
        """Take in what one call does to channels that it reads."""
        if node.op == "output":
            self._return(node, joins)
        elif not isinstance(node.meta["val"], Tensor | tuple | list):
            return  # a size
        elif (attention := Attention.match(node)) is not None:
            self._attend(attention)
        elif (rotary := Rotary.match(node)) is not None:
            self._turn(rotary)
        elif is_call(node, _PRODUCTS):
            self._multiply(node)
        elif is_call(node, _SAME):
            self.ids[node] = self.ids[node.all_input_nodes[0]]
        elif is_call(node, _TIMES) and (factor := self._factor(node)) is not None:
            self.ids[node] = factor.expand(shape_of(node))
        elif is_call(node, _PLUS) and all(n in self.ids for n in node.args[:2]):
            self._add(node)
        elif node in joins or is_move(node) or is_call(node, _MOVES):
            self._move(node, foreign=node in joins)
        else:
            self._fix(node, *node.all_input_nodes)

    def _factor(self, node: fx.Node) -> Any:
        """Return the channels that a product hands on: those of its one factor that has some."""
        first, second = node.args[0], node.args[1]
        if first in self.ids and second not in self.ids:
            return self.ids[first]  # type: ignore[index]
        divides = is_call(node, (aten.div.Tensor, aten.div.Scalar))
        return None if divides or first in self.ids else self.ids.get(second)  # type: ignore[arg-type]

    def _add(self, node: fx.Node) -> None:
        left, right = (self.ids[n].expand(shape_of(node)) for n in node.args[:2])  # type: ignore[index]
        self.ids[node] = left
        self.equal.append(_pairs(left, right))

    def _move(self, node: fx.Node, *, foreign: bool) -> None:
        """Run a call on the numbers of channels."""
        others = [n for n in node.all_input_nodes if _is_tensor(n) and n not in self.ids]
        if others and not foreign:
            self._fix(node, *node.all_input_nodes)
            return
        args = fx.node.map_arg(node.args, lambda n: self.ids[n] if n in self.ids else _outside(n))
        assert callable(node.target)
        self.ids[node] = node.target(*fx.node.map_aggregate(args, _number), **node.kwargs)

    def _attend(self, attention: Attention) -> None:
        query, key = self.ids.get(attention.query), self.ids.get(attention.key)
        others = [n for n in (attention.value, attention.mask) if n is not None]
        if query is None or key is None or query.dim() != 4:
            others += [attention.query, attention.key]
        else:
            # every token of a head has the same channels, and past ones are foreign
            wide = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
            self.inverse.append(_pairs(query.expand(wide.shape), wide))
        self._fix(attention.node, *others)

    def _turn(self, rotary: Rotary) -> None:
        ids = self.ids.get(rotary.input)
        if ids is None or rotary.cos in self.ids or rotary.sin in self.ids:
            self._fix(rotary.node, *rotary.node.all_input_nodes)
            return
        self.ids[rotary.node] = ids
        self.equal.append(_pairs(*pairs(ids[..., : rotary.turned], rotary.interleaved)))

    def _multiply(self, node: fx.Node) -> None:
        left, right = (self.ids.get(n) for n in node.args[:2])  # type: ignore[arg-type]
        if left is None or right is None:
            self._fix(node, *node.all_input_nodes)
            return
        rows, columns = left.unsqueeze(-1), right.unsqueeze(-3)  # [.., m, c, 1], [.., 1, c, n]
        shape = [*left.shape, right.shape[-1]]
        self.inverse.append(_pairs(rows.expand(shape), columns.expand(shape)))

    def _return(self, node: fx.Node, joins: set[fx.Node]) -> None:
        self._fix(node, *(n for n in node.all_input_nodes if n not in joins))

    def _fix(self, why: fx.Node, *nodes: fx.Node) -> None:
        for node in nodes:
            parts = self.ids.get(node, ())
            for ids in parts if isinstance(parts, tuple | list) else (parts,):
                self.fixed.append((known(ids), why))

    def scales(self, keys: Tensor) -> Scales:
        """Sort channels into those that can be scaled together, and those that cannot be.

        Args:
            keys: channels that keys are made of; the others count as queries.
        """
        is_key = torch.zeros(self.count, dtype=torch.bool)
        is_key[keys] = True
        none = torch.empty(2, 0, dtype=torch.int64)
        equal, inverse = (torch.cat([none, *pairs], 1) for pairs in (self.equal, self.inverse))
        labels = components(self.count, torch.cat([equal, inverse], 1))
        wrong = [
            *(ids for ids, _ in self.fixed),
            equal[0, is_key[equal[0]] != is_key[equal[1]]],
            inverse[0, is_key[inverse[0]] == is_key[inverse[1]]],
        ]
        free = torch.ones(self.count, dtype=torch.bool)
        free[labels[torch.cat(wrong)]] = False
        met = torch.zeros(self.count, dtype=torch.bool)
        met[labels[inverse[0]]] = True
        return Scales(labels, is_key, (free & met)[labels])

    def why_fixed(self, channels: Tensor, labels: Tensor) -> fx.Node | None:
        """Return a call that keeps some of ``channels`` from being scaled, the last one found."""
        mine = labels[channels]
        for ids, node in reversed(self.fixed):
            if bool(torch.isin(labels[ids], mine).any()):
                return node
        return None


@dataclass(frozen=True, slots=True)
class Scales:
    """Channels by the scale that they share.

    Attributes:
        labels: int64 [channels]; the same for all that have one scale or its inverse.
        is_key: whether a channel takes the scale, or, as a query's, its inverse.
        free: whether it may be scaled.
    """

    labels: Tensor
    is_key: Tensor
    free: Tensor

    def factors(self, size: Tensor) -> Tensor:
        """Return what to multiply each channel with, so that keys of ``size`` become 1.

        Args:
            size: of each label, float64 [channels]; 0 where nothing is to be done.
        """
        own = torch.where(self.free & (size[self.labels] > 0), size[self.labels], 1.0)
        return torch.where(self.is_key, 1 / own, own)


def number_last(node: fx.Node, first: int) -> Ids:
    """Return numbers that count a node's last axis from ``first`` and repeat along the others."""
    shape = shape_of(node)
    return torch.arange(first, first + shape[-1]).expand(shape)


def number_heads(node: fx.Node, first: int) -> Ids:
    """Return numbers that count heads and channels of ``[batch, heads, tokens, width]``."""
    _, heads, _, width = shape = shape_of(node)
    ids = torch.arange(first, first + heads * width).view(1, heads, 1, width)
    return ids.expand(shape)


def components(count: int, edges: Tensor) -> Tensor:
    """Return for each point the smallest point that a path of edges [2, n] leads to."""
    labels = torch.arange(count)
    while True:
        least = labels[edges].amin(0)
        new = labels.scatter_reduce(0, edges.flatten(), least.repeat(2), "amin")
        new = new[new]
        if torch.equal(new, labels):
            return labels
        labels = new


def _pairs(a: Tensor, b: Tensor) -> Tensor:
    """Return the different pairs of numbers at the same places, [2, n], foreign ones left out."""
    both = torch.stack([a.flatten(), b.flatten()])
    both = both[:, (both != FOREIGN).all(0)]
    return distinct(both, dim=1) if both.numel() else both


def distinct(values: Tensor, dim: int | None = None) -> Tensor:
    """Return each value once, or each slice along ``dim``, in ascending order."""
    found: Tensor = torch.unique(values, dim=dim)
    return found


def known(ids: Tensor) -> Tensor:
    """Return each channel among ``ids`` once."""
    flat = distinct(ids)
    return flat[flat != FOREIGN]


def shape_of(node: fx.Node) -> list[int]:
    """Return the sizes of a value, with every symbol at 1."""
    return [_number(size) for size in node.meta["val"].shape]


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], Tensor)


def _outside(node: fx.Node) -> Any:
    value = node.meta["val"]
    return torch.full(shape_of(node), FOREIGN) if isinstance(value, Tensor) else value


def _number(value: Any) -> Any:
    """Return a size with every symbol at 1."""
    if not isinstance(value, torch.SymInt):
        return value
    formula = value.node.expr
    return int(formula.subs(dict.fromkeys(formula.free_symbols, 1)))
