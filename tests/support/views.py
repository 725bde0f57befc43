"""What a program calls: the typed views of one kind, and plain names."""

from __future__ import annotations

from typing import Protocol, Self, TypeVar

from torch import fx

from modelathe.ir import Program, QuantizedEmbedding, QuantizedLinear, call_name, path_of


class View(Protocol):
    """A reading of one call, as ``Linear`` and ``Norm`` are."""

    @classmethod
    def match(cls, node: fx.Node) -> Self | None: ...


V = TypeVar("V", bound=View)


def views(kind: type[V], found: Program | fx.Graph) -> list[V]:
    """Return the views of a kind in a graph, or in all graphs of a program, in order."""
    graphs = found.graphs.values() if isinstance(found, Program) else [found]
    return [view for graph in graphs for node in graph.nodes if (view := kind.match(node))]


def quantized_calls(found: Program) -> dict[str, QuantizedLinear | QuantizedEmbedding]:
    """Return the calls on codes, by module path."""
    matches = (QuantizedLinear.match, QuantizedEmbedding.match)
    made = [match(node) for node in found.graph.nodes for match in matches]
    return {path_of(call.node): call for call in made if call is not None}


def calls(found: Program) -> list[str]:
    """Return the names of all that the main graph calls, in order."""
    return [call_name(node) for node in found.graph.nodes if node.op == "call_function"]
