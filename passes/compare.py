"""Whether one graph makes the calls of another, but for what a pass says that it rewrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from ..ir import PassError, Program, path_of

Same = Callable[[fx.Node, fx.Node], bool]
Accept = Callable[[fx.Node, fx.Node, Same], bool]


def same_arguments(a: fx.Node, b: fx.Node, same: Same) -> bool:
    """Whether two calls have the same constants, and nodes that ``same`` calls the same."""
    left, left_shape = pytree.tree_flatten((a.args, a.kwargs))
    right, right_shape = pytree.tree_flatten((b.args, b.kwargs))
    return left_shape == right_shape and all(
        _same_leaf(x, y, same) for x, y in zip(left, right, strict=True)
    )


def _same_leaf(x: Any, y: Any, same: Same) -> bool:
    if isinstance(x, fx.Node) and isinstance(y, fx.Node):
        return same(x, y)
    return type(x) is type(y) and bool(x == y)


def rewritten_calls(
    before: fx.Graph, after: fx.Graph, accept: Accept
) -> list[tuple[fx.Node, fx.Node]]:
    """Pair the calls of two graphs in order; return the pairs that differ.

    Args:
        before: a graph.
        after: a graph whose calls stand in the same order.
        accept: ``accept(x, y, same)``: whether ``y`` may stand for ``x`` although it is not the
            same call on the same values and weights; ``same`` tells which values are.

    Raises:
        PassError: a call is missing, too many, or differs and is not accepted.
    """
    lefts, rights = _live(before), _live(after)
    partner: dict[fx.Node, fx.Node] = {}

    def same(x: fx.Node, y: fx.Node) -> bool:
        if x.op == "get_attr" or y.op == "get_attr":
            return x.op == y.op and x.target == y.target
        return partner.get(x) is y

    pairs = []
    for x, y in zip(lefts, rights, strict=False):
        if x.op != y.op or x.target != y.target or not same_arguments(x, y, same):
            if not accept(x, y, same):
                place = f" (in {path_of(x)})" if path_of(x) else ""
                raise PassError(f"%{y.name}: does not do what %{x.name} did{place}")
            pairs.append((x, y))
        partner[x] = y
    if len(lefts) != len(rights):
        raise PassError(f"the graph had {len(lefts)} calls, inputs and outputs: {len(rights)} now")
    return pairs


def _live(graph: fx.Graph) -> list[fx.Node]:
    """Return inputs, output, and the calls that the output depends on, in graph order."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("placeholder", "output") or node in needed:
            needed.add(node)
            needed.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in needed and node.op != "get_attr"]


def check_same_values(before: Program, after: Program) -> None:
    """Check that a name that both programs have stands for one weight.

    Raises:
        PassError: it does not: a changed weight needs a new name.
    """
    for name in set(before.weights) & set(after.weights):
        if before.weights[name].fingerprint != after.weights[name].fingerprint:
            raise PassError(f"@{name}: stands for another weight now")
