"""The cache entries of a graph: where past keys and values are joined with new ones."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ...ir import Program
from ...ir.calls import argument, aten

PAST, PRESENT = "past_key_values", "present"
Part = Literal["key", "value"]
PARTS: tuple[Part, Part] = ("key", "value")
_ENTRY = re.compile(rf"{PAST}\.(?P<number>\d+)\.(?P<part>key|value)")


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """The keys or the values of one block: ``join = cat([past, newest], tokens)``.

    Attributes:
        number: of the entry; ``past_key_values.N``.
        part: which half of it.
        past: the input; [batch, heads, past, width].
        newest: the new keys or values; [batch, heads, sequence, width].
        join: both, which attention reads and the graph returns.
    """

    number: int
    part: Part
    past: fx.Node
    newest: fx.Node
    join: fx.Node

    @property
    def name(self) -> str:
        """The input's name."""
        return f"{PAST}.{self.number}.{self.part}"

    @property
    def numbers(self) -> int:
        """How many numbers the entry holds for each token."""
        _, heads, _, width = self.newest.meta["val"].shape
        return int(heads) * int(width)


@dataclass(frozen=True, slots=True)
class Entries:
    """The entries of a graph, by number, key before value.

    Attributes:
        found: those that can be worked on.
        refused: name of an entry to why it cannot be.
    """

    found: tuple[Entry, ...]
    refused: dict[str, str]

    @classmethod
    def of(cls, program: Program, graph: str) -> Entries:
        """Find the entries of a graph; none in one without a cache."""
        signature, nodes = program.signatures[graph], program.graphs[graph]
        results: Any = nodes.output_node().args[0]
        returned = dict(zip(signature.outputs, results, strict=True))
        found: list[Entry] = []
        refused: dict[str, str] = {}
        for node in nodes.find_nodes(op="placeholder"):
            match = _ENTRY.fullmatch(str(node.target))
            if match is None:
                continue
            join = returned.get(str(node.target).replace(PAST, PRESENT, 1))
            entry = _entry(node, int(match["number"]), _part(match["part"]), join, results)
            if isinstance(entry, Entry):
                found.append(entry)
            else:
                refused[str(node.target)] = entry
        found.sort(key=lambda entry: (entry.number, PARTS.index(entry.part)))
        return cls(tuple(found), refused)

    def pairs(self) -> dict[int, tuple[Entry, Entry]]:
        """Return key and value of the blocks that have both, by number."""
        keys = {entry.number: entry for entry in self.found if entry.part == "key"}
        values = {entry.number: entry for entry in self.found if entry.part == "value"}
        return {number: (keys[number], values[number]) for number in keys if number in values}


def _part(text: str) -> Part:
    return "key" if text == "key" else "value"


def _entry(past: fx.Node, number: int, part: Part, join: Any, results: Any) -> Entry | str:
    """Return an entry, or why it is none that can be worked on."""
    if past.meta["val"].dtype == torch.uint8:
        return "it is stored as codes already"
    if not isinstance(join, fx.Node) or join.target is not aten.cat.default:
        return "what the graph returns for it is not the input with new tokens behind"
    parts, dim = argument(join, 0, "tensors"), argument(join, 1, "dim", 0)
    whole = len(parts) == 2 and parts[0] is past and isinstance(parts[1], fx.Node)
    if join.meta["val"].dim() != 4 or dim not in (2, -2) or not whole:
        return "what the graph returns for it is not the input with new tokens behind"
    others = [u for u in past.users if u is not join and u.target is not aten.sym_size.int]
    if others:
        return f"the past is also read by %{others[0].name}"
    if sum(result is join for result in results) != 1:
        return "the graph returns it twice"
    return Entry(number, part, past, parts[1], join)


def graph_with_cache(program: Program) -> str | None:
    """Return the name of the graph that reads a cache; None where no graph does."""
    for name, signature in program.signatures.items():
        if any(_ENTRY.fullmatch(one) for one in signature.inputs):
            return name
    return None


def cache_bytes(program: Program) -> int:
    """Return the bytes that one token adds to the cache, scales and zero points included."""
    graph = graph_with_cache(program)
    if graph is None:
        return 0
    total = 0
    for node in program.graphs[graph].find_nodes(op="placeholder"):
        if str(node.target).startswith(f"{PAST}."):
            _, heads, _, width = node.meta["val"].shape
            total += int(heads) * int(width) * node.meta["val"].dtype.itemsize
    return total
