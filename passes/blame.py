"""Which node of a rewritten program is the wrong one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..ir import Program, call_name
from .probes import Inputs


def first_wrong_node(
    before: Program,
    after: Program,
    graph: str,
    inputs: Inputs,
    dtype: torch.dtype | None,
    limit: float,
) -> str:
    """Return the first node that the rewrite edited and whose value spoils what was not edited.

    A right rewrite may change a value in between (a norm whose gain moved into its readers) as long
    as the readers, edited too, make up for it.  So the culprit is an edited node that differs and
    that a node outside the edit reads, and that differs as well.  Without one, the first node that
    differs; without that, nothing: only the outputs' order or names are wrong.

    Args:
        before: the pass's input.
        after: its result.
        graph: the graph to look at.
        inputs: on which an output differs.
        dtype: to compute in.
        limit: largest relative error of a value that counts as equal.
    """
    expected = _values(before, graph, inputs, dtype)
    found = _values(after, graph, inputs, dtype)
    old = {node.name: _text(before, node) for node in before.graphs[graph].nodes}
    calls = [node for node in after.graphs[graph].nodes if node.op == "call_function"]
    edited = {node for node in calls if old.get(node.name) != _text(after, node)}
    differs = {node for node in calls if _differs(node, expected, found, limit)}
    for node in calls:
        if node in edited and (node in differs or node.name not in expected):
            outside = [user for user in node.users if user not in edited]
            if any(user in differs or user.op == "output" for user in outside):
                return f"%{node.name} ({call_name(node)})"
    for node in calls:
        if node in differs:
            return f"%{node.name} ({call_name(node)})"
    return ""


def _values(
    program: Program, graph: str, inputs: Inputs, dtype: torch.dtype | None
) -> dict[str, Any]:
    values: dict[str, Any] = {}

    def keep(node: fx.Node, value: Any) -> None:
        if node.op == "call_function":
            values[node.name] = value

    program.run(inputs, graph, observe=keep, dtype=dtype)
    return values


def _text(program: Program, node: fx.Node) -> str:
    """Return what a node does: its call, and the weights it reads by value."""

    def name(argument: fx.Node) -> str:
        if argument.op == "get_attr":
            return program.weight(argument).fingerprint
        return argument.name

    args = fx.node.map_arg((node.args, node.kwargs), name)
    return f"{node.target} {args}"


def _differs(node: fx.Node, expected: dict[str, Any], found: dict[str, Any], limit: float) -> bool:
    from .fidelity import relative_error

    if node.name not in expected:
        return False
    a, b = expected[node.name], found[node.name]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return relative_error(a, b) > limit
    if isinstance(a, tuple | list):
        return False
    return bool(a != b)
