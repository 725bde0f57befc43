"""Which node of a rewritten program is the wrong one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..ir import Program, call_name, is_finite, path_of
from .outputs import batches, predictions, token_batch
from .probes import Inputs


def place_of(node: fx.Node) -> str:
    """Return a call as messages name it, such as ``%linear_3 (aten.linear of h.0.mlp.c_fc)``."""
    path = path_of(node)
    return f"%{node.name} ({call_name(node)}{f' of {path}' if path else ''})"


@dataclass(slots=True)
class NotFinite:
    """Watches a run for the first call that gives nan or inf.

    Attributes:
        place: that call as messages name it; empty if there was none.
    """

    place: str = ""

    def observe(self, node: fx.Node, value: Any) -> None:
        """Look at a value."""
        if self.place or node.op != "call_function" or not isinstance(value, Tensor):
            return
        if bool((value.isnan() | value.isposinf()).any()):  # masks hold -inf on purpose
            self.place = place_of(node)


def not_finite(program: Program, tokens: Tensor, device: str = "cpu") -> str:
    """Return the first call that gives nan or inf, if predictions hold any; empty if not.

    Args:
        program: reads tokens; computed in float32.
        tokens: int64 [windows, length].
        device: where to compute.
    """
    watch = NotFinite()

    def run(inputs: Inputs, graph: str) -> dict[str, Tensor]:
        return program.run(inputs, graph, watch.observe, torch.float32, device=device)

    for batch in batches(tokens):
        if not is_finite(predictions(program, token_batch(program, batch), run)):
            return watch.place or "an output"
    return ""


def first_wrong_node(
    before: Program,
    after: Program,
    graph: str,
    inputs: Inputs,
    dtype: torch.dtype | None,
    limit: float,
    output: str | None = None,
) -> str:
    """Return the first node that the rewrite edited and whose value spoils an output.

    A right rewrite may change a value in between (a norm whose gain moved into its readers) as long
    as the readers make up for it.  So the culprit is an edited node that differs, from which nodes
    that differ lead to an output, and that a node outside the edit reads.  Without one, the first
    node that differs and leads there; without that, nothing: only the outputs' order or names are
    wrong.

    Args:
        before: the pass's input.
        after: its result.
        graph: the graph to look at.
        inputs: on which an output differs.
        dtype: to compute in.
        limit: largest relative error of a value that counts as equal.
        output: name of the output that is wrong; None for any.
    """
    values = _values(before, graph, inputs, dtype), _values(after, graph, inputs, dtype)
    partners = _partners(before.graphs[graph], after.graphs[graph])
    calls = [node for node in after.graphs[graph].nodes if node.op == "call_function"]
    names = {new: old.name for new, old in partners.items()}
    edited = {
        node
        for node in calls
        if node not in partners or _text(after, node, names) != _text(before, partners[node], {})
    }
    differs = {node for node in calls if _differs(node, partners, *values, limit)}
    ends = _returned(after, graph, output)
    wrong = differs | {node for node in calls if node not in partners}
    spoils = _leading_to_outputs(calls, wrong, ends)
    for node in calls:
        if node in edited and node in spoils:
            outside = [user for user in node.users if user not in edited]
            if any(user in spoils or (user.op == "output" and node in ends) for user in outside):
                return place_of(node)
    return next((place_of(node) for node in calls if node in spoils and node in differs), "")


def _returned(program: Program, graph: str, output: str | None) -> set[fx.Node]:
    """Return the values that a graph returns under a name, or under any."""
    (results,) = program.graphs[graph].output_node().args
    assert isinstance(results, tuple | list)
    names = program.signatures[graph].outputs
    return {
        result
        for name, result in zip(names, results, strict=True)
        if isinstance(result, fx.Node) and output in (None, name)
    }


def _leading_to_outputs(
    calls: list[fx.Node], wrong: set[fx.Node], ends: set[fx.Node]
) -> set[fx.Node]:
    """Return those of ``wrong`` from which a path through wrong ones leads to one of ``ends``.

    Where an edit is made up for further down, the path ends.
    """
    found: set[fx.Node] = set()
    for node in reversed(calls):
        if node in wrong and (node in ends or any(user in found for user in node.users)):
            found.add(node)
    return found


def _partners(before: fx.Graph, after: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return the node of ``before`` that each node of ``after`` stands for, as far as it is clear.

    The node of the same name; a node of a new name stands for what its reader, otherwise the same
    call, read in its place.
    """
    old = {node.name: node for node in before.nodes}
    partners: dict[fx.Node, fx.Node] = {}
    for node in reversed(after.nodes):
        mine = old.get(node.name, partners.get(node))
        if mine is None or (node.op, node.target) != (mine.op, mine.target):
            if mine is not None:
                partners[node] = mine
            continue
        partners[node] = mine
        left, left_shape = pytree.tree_flatten((mine.args, mine.kwargs))
        right, right_shape = pytree.tree_flatten((node.args, node.kwargs))
        if left_shape != right_shape:
            continue
        for a, b in zip(left, right, strict=True):
            if isinstance(a, fx.Node) and isinstance(b, fx.Node) and b.name not in old:
                partners.setdefault(b, a)
    return partners


def _text(program: Program, node: fx.Node, names: dict[fx.Node, str]) -> str:
    """Return what a node does: its call, and the weights it reads by value."""

    def name(argument: fx.Node) -> str:
        if argument.op == "get_attr":
            return program.weight(argument).fingerprint
        return names.get(argument, argument.name)

    args = fx.node.map_arg((node.args, node.kwargs), name)
    return f"{node.target} {args}"


def _values(
    program: Program, graph: str, inputs: Inputs, dtype: torch.dtype | None
) -> dict[str, Any]:
    values: dict[str, Any] = {}

    def keep(node: fx.Node, value: Any) -> None:
        if node.op != "get_attr":
            values[node.name] = value

    program.run(inputs, graph, observe=keep, dtype=dtype)
    return values


def _differs(
    node: fx.Node,
    partners: dict[fx.Node, fx.Node],
    expected: dict[str, Any],
    found: dict[str, Any],
    limit: float,
) -> bool:
    from .fidelity import relative_error

    if node not in partners or partners[node].name not in expected:
        return False
    a, b = expected[partners[node].name], found[node.name]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return relative_error(a, b) > limit
    if isinstance(a, Tensor | tuple | list):
        return False
    return bool(a != b)
