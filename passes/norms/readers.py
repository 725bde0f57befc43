"""Which linears read a value, who else does, and who else reads their weights."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from ...ir import (
    Embedding,
    Linear,
    Program,
    QuantizedEmbedding,
    QuantizedLinear,
    call_name,
    is_weight,
    path_of,
)
from ..base import Remark
from .channels import carried

CENTERINGS = "centered_in", "centered_logits", "centered_out"
"""What names of weights without a mean end with; along one axis they stay so along the other."""


def readers(node: fx.Node) -> tuple[list[Linear], list[fx.Node]]:
    """Return the linears that read the last dimension of a value, and whatever else reads it.

    Between them may stand calls that move rows and leave the last dimension alone.
    """
    linears: list[Linear] = []
    others: list[fx.Node] = []
    for user in node.users:
        linear = Linear.match(user)
        if linear is not None and linear.input is node and has_weights(linear):
            linears.append(linear)
        elif _moves_rows(user, node):
            further = readers(user)
            linears += further[0]
            others += further[1]
        else:
            others.append(user)
    return linears, others


def has_weights(linear: Linear) -> bool:
    """Tell whether weight and bias of a linear are weights of the program, not activations."""
    return is_weight(linear.weight) and (linear.bias is None or is_weight(linear.bias))


def _moves_rows(user: fx.Node, source: fx.Node) -> bool:
    """Tell whether a call leaves the last dimension of ``source`` as it is, and last."""
    axis = carried(user, source, source.meta["val"].dim() - 1)
    return axis is not None and axis == user.meta["val"].dim() - 1


def is_quantized(node: fx.Node) -> bool:
    """Tell whether a call reads codes."""
    return bool(QuantizedLinear.match(node) or QuantizedEmbedding.match(node))


def named(node: fx.Node) -> str:
    """Return a call as remarks name it, such as ``%add (aten.add.Tensor)``."""
    return f"%{node.name} ({call_name(node)})"


def elsewhere(program: Program, weight: fx.Node, alike: Collection[fx.Node]) -> list[fx.Node]:
    """Return the calls that read the same weight, in any graph, and are not among ``alike``."""
    return [
        user
        for graph in program.graphs.values()
        for node in graph.find_nodes(op="get_attr")
        if node.target == weight.target
        for user in node.users
        if user not in alike
    ]


def tied(reader: fx.Node, other: fx.Node) -> str:
    """Return why ``reader`` does not get a weight that ``other`` reads too."""
    pair = {bool(Embedding.match(reader)), bool(Embedding.match(other))}
    if pair == {True, False}:
        return "head is tied; untie=true to force"
    return f"the weight of %{reader.name} is also read by {named(other)}; untie=true to force"


def untied(program: Program, reader: fx.Node, weight: fx.Node, other: fx.Node) -> Remark:
    """Return the remark that a call gets a copy of a weight that ``other`` keeps."""
    size = program.weight(weight).bytes
    where = path_of(reader) or reader.name
    return Remark("applied", reader.name, f"untied {where} from %{other.name}: {size} bytes")


def nothing(program: Program, option: str, reason: str) -> Remark:
    """Return the remark that an option found nothing to do in the whole program."""
    return Remark("missed", next(iter(program.graphs)), f"{option}: {reason}")


def in_order(program: Program, remarks: list[Remark]) -> list[Remark]:
    """Return remarks in the order of the nodes that they name; those on no node come first."""
    order = {
        node.name: i for graph in program.graphs.values() for i, node in enumerate(graph.nodes)
    }
    return sorted(remarks, key=lambda remark: order.get(remark.where, -1))
