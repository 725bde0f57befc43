"""Where keys and queries of a cache are made, and how large their channels get."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...ir import Attention, Linear, Program, QuantizedLinear, is_weight
from ..canonical.places import is_move
from ..context import PassContext
from ..outputs import observe_graph
from .channels import Channels, Scales, distinct, number_heads, number_last
from .entries import Entries, Entry


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of all linears as numbered channels.

    Attributes:
        keys: the entries of keys.
        first: name of a weight to the number of its first row; linears that share it share those.
        linears: the linears that read those weights.
        channels: where their rows go.
        scales: which rows must have one scale, and which may have any.
    """

    keys: tuple[Entry, ...]
    first: dict[str, int]
    linears: tuple[Linear, ...]
    channels: Channels
    scales: Scales

    @classmethod
    def of(cls, program: Program, graph: str, entries: Entries) -> Rows:
        """Number the rows of a graph's linears and follow them."""
        nodes = program.graphs[graph]
        linears = tuple(one for one in map(Linear.match, nodes.nodes) if one and _is_plain(one))
        first: dict[str, int] = {}
        count = 0
        for linear in linears:
            if (name := str(linear.weight.target)) not in first:
                first[name], count = count, count + int(linear.weight.meta["val"].shape[0])
        sources = {
            one.node: number_last(one.node, first[str(one.weight.target)]) for one in linears
        }
        channels = Channels.follow(nodes, sources, entries)
        channels.fixed += [
            (distinct(sources[one.node]), reader)
            for one, reader in _other_readers(program, linears)
        ]
        keys = tuple(entry for entry in entries.found if entry.part == "key")
        made = [channels.ids[e.newest].flatten() for e in keys if e.newest in channels.ids]
        numbers = distinct(torch.cat([torch.empty(0, dtype=torch.int64), *made]))
        return cls(keys, first, linears, channels, channels.scales(numbers))

    def of_linear(self, linear: Linear) -> slice:
        """Return which channels a linear's outputs are."""
        first = self.first[str(linear.weight.target)]
        return slice(first, first + int(linear.weight.meta["val"].shape[0]))

    def of_entry(self, entry: Entry) -> Tensor | None:
        """Return the channel of each key of a token, [heads, width]; None where it is not clear."""
        ids = self.channels.ids.get(entry.newest)
        return None if ids is None else ids[0, :, 0]

    def obstacle(self, entry: Entry) -> str:
        """Return why the keys of an entry cannot be scaled in linears, or not all of them."""
        ids = self.of_entry(entry)
        if ids is not None:
            node = self.channels.why_fixed(ids[~self.scales.free[ids]], self.scales.labels)
            return f"its keys or queries are read by %{node.name}" if node else "no query meets it"
        for node in _behind(entry.newest):
            if QuantizedLinear.match(node):
                return f"%{node.name} is quantised already: smooth keys before"
            if any(node is why for _, why in self.channels.fixed):
                return f"%{node.name} lies between its linear and the cache"
        return "no linear makes its keys"

    def measure(
        self, program: Program, context: PassContext, graph: str
    ) -> tuple[Tensor, dict[Entry, Tensor]]:
        """Return how large keys get on calibration text.

        Returns:
            for each label the largest norm of a token's keys in its rows, float64 [channels], 0 for
            labels without; and for each entry the largest ``|k|``, float64 [heads, width].
        """
        meter = _Meter(self)
        windows = context.calibration_tokens(program).tokens
        observe_graph(program, graph, windows, meter.observe, context, "measuring keys")
        return meter.sizes, meter.largest


class _Meter:
    """Takes maxima while a graph runs."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.linears = {linear.node: linear for linear in rows.linears}
        self.entries = {entry.newest: entry for entry in rows.keys}
        self.sizes = torch.zeros(rows.channels.count, dtype=torch.float64)
        self.largest: dict[Entry, Tensor] = {}

    def observe(self, node: fx.Node, value: Tensor) -> None:
        """Take the value of a node."""
        if node in self.linears:
            self._rows(self.linears[node], value)
        if node in self.entries:
            peak = value.double().abs().amax((0, 2)).cpu()
            entry = self.entries[node]
            self.largest[entry] = torch.maximum(peak, self.largest.get(entry, peak))

    def _rows(self, linear: Linear, value: Tensor) -> None:
        scales, own = self.rows.scales, self.rows.of_linear(linear)
        wanted = (scales.is_key & scales.free)[own].nonzero().flatten()
        if not len(wanted):
            return
        each = scales.labels[own][wanted]
        labels = distinct(each)
        places = torch.searchsorted(labels, each)
        squares = value.flatten(0, -2)[:, wanted.to(value.device)].double().square().cpu()
        sums = torch.zeros(len(squares), len(labels), dtype=torch.float64)
        sums.index_add_(1, places, squares)
        self.sizes[labels] = torch.maximum(self.sizes[labels], sums.sqrt().amax(0))


@dataclass(frozen=True, slots=True, eq=False)
class RunTime:
    """A key entry and the queries that meet it, both scaled when the model runs.

    Attributes:
        entry: the keys.
        attentions: what reads them.
        scales: keys and queries as numbered channels, keys first.
    """

    entry: Entry
    attentions: tuple[Attention, ...]
    scales: Scales

    @classmethod
    def of(cls, entry: Entry, entries: Entries) -> RunTime | str:
        """Find the queries of an entry; return why not where they are not clear."""
        attentions = tuple(_attentions(entry))
        if not attentions:
            return "no attention call reads it"
        sources = {entry.newest: number_heads(entry.newest, 0)}
        for attention in attentions:
            first = 1 + max(int(ids.max()) for ids in sources.values())
            sources.setdefault(attention.query, number_heads(attention.query, first))
        channels = Channels.follow(entry.join.graph, sources, entries)
        scales = channels.scales(torch.arange(entry.numbers))
        if not bool(scales.free.all()):
            node = channels.why_fixed(torch.arange(channels.count), scales.labels)
            return f"its keys or queries are also read by %{node.name}" if node else "no query"
        return cls(entry, attentions, scales)


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the calls that a value is made of, nearest first, back to products."""
    waiting, seen = [node], {node}
    while waiting:
        one = waiting.pop(0)
        yield one
        if Linear.match(one) or QuantizedLinear.match(one):
            continue
        new = [n for n in one.all_input_nodes if n.op == "call_function" and n not in seen]
        seen.update(new)
        waiting += new


def _attentions(entry: Entry) -> Iterator[Attention]:
    """Yield the attentions that read the keys of an entry."""
    waiting, seen = [entry.join], {entry.join}
    while waiting:
        node = waiting.pop()
        for user in node.users:
            attention = Attention.match(user)
            if attention is not None and attention.key is node:
                yield attention
            elif is_move(user) and user not in seen:
                seen.add(user)
                waiting.append(user)


def _is_plain(linear: Linear) -> bool:
    return is_weight(linear.weight) and (linear.bias is None or is_weight(linear.bias))


def _other_readers(
    program: Program, linears: tuple[Linear, ...]
) -> Iterator[tuple[Linear, fx.Node]]:
    """Yield linears whose weight or bias is read by a call that is no linear of that weight."""
    readers: dict[str, list[fx.Node]] = {}
    for graph in program.graphs.values():
        for node in graph.find_nodes(op="get_attr"):
            readers.setdefault(str(node.target), []).extend(node.users)
    alike: dict[str, set[fx.Node]] = {}
    for linear in linears:
        alike.setdefault(str(linear.weight.target), set()).add(linear.node)
    for linear in linears:
        parts = [str(part.target) for part in (linear.weight, linear.bias) if part is not None]
        users = (user for part in parts for user in readers[part])
        other = next((user for user in users if user not in alike[parts[0]]), None)
        if other is not None:
            yield linear, other
