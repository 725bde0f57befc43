"""Rotary position embeddings that models write as sums, raised to one call each.

With the last axis of x in pairs (x1, x2), which are its halves or its neighbours, and the same
angle for both of a pair, ``x cos + (-x2, x1) sin`` turns every pair.  How a model takes x apart and
joins it again, and how it writes an angle for both of a pair, is not matched call by call: numbers
that stand for entries are moved as the calls move entries, and compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ...ir import Program, insert_call
from ...ir.calls import argument
from ...ir.ops import pairs, unpaired
from .match import aten, is_call, operands, same_sizes, same_value
from .places import is_move, made_of, numbered

# Calls that work number by number, and so keep equal what is equal.
_PER_NUMBER = (
    aten.cos.default,
    aten.sin.default,
    aten._to_copy.default,
    aten.clone.default,
    aten.mul.Tensor,  # by a single number
    aten.mul.Scalar,
)


@dataclass(frozen=True, slots=True)
class _Sum:
    """``vector * cos + turned * sin``, where ``turned`` is (-x2, x1) of the pairs of ``vector``."""

    node: fx.Node
    vector: fx.Node
    cos: fx.Node
    sin: fx.Node
    interleaved: bool


def raise_rotaries(program: Program, graph: fx.Graph) -> list[fx.Node]:
    """Raise ``x cos + (-x2, x1) sin`` to one call, with the channels behind it that stay.

    Sines and cosines are taken of one angle for each pair.  Where a model turns
    ``[batch, tokens, heads, width]``, heads are brought to the front for it.
    """
    raised = []
    angles = _Angles(graph)
    for node in list(graph.nodes):
        found = _sum(node)
        if found is not None and (halved := angles.of(found)) is not None:
            raised.append(_insert(graph, found, *halved))
    return raised


def _sum(node: fx.Node) -> _Sum | None:
    """Match a rotary position embedding, as long as nothing is known of its angles."""
    for straight, other in operands(node, (aten.add.Tensor,)):
        for turned, sin in operands(other, (aten.mul.Tensor,)):
            for vector, cos in operands(straight, (aten.mul.Tensor,)):
                if not isinstance(cos, fx.Node) or not isinstance(sin, fx.Node):
                    continue
                if not _is_paired(node, vector) or not _is_paired(turned, vector):
                    continue
                interleaved = _quarter_turn(turned, vector)
                if interleaved is not None:
                    return _Sum(node, vector, cos, sin, interleaved)
    return None


def _is_paired(node: fx.Node, vector: fx.Node) -> bool:
    """Tell whether both have the same four axes, the last one with an even number of entries."""
    value, other = node.meta["val"], vector.meta["val"]
    if not isinstance(value, Tensor) or not isinstance(other, Tensor) or other.dim() != 4:
        return False
    width = other.shape[-1]
    return isinstance(width, int) and width % 2 == 0 and same_sizes(value, other)


def _quarter_turn(turned: fx.Node, vector: fx.Node) -> bool | None:
    """Return whether neighbours are the pairs that ``turned`` has as (-x2, x1); None if it is not.

    Sizes that are not known are taken to be those of the example.
    """
    numbers = _numbered(vector)
    found = made_of(turned, vector, numbers)
    if found is None:
        return None
    for interleaved in (False, True):
        first, second = pairs(numbers, interleaved)
        if torch.equal(found, unpaired(-second, first, interleaved)):
            return interleaved
    return None


def _numbered(node: fx.Node) -> Tensor:
    """Return a number for each entry, from 1: there is no -0."""
    value = node.meta["val"]
    return numbered(value, tuple(range(value.dim()))) + 1


@dataclass(frozen=True, slots=True)
class _Angles:
    """Sines and cosines with one number for each pair.

    Attributes:
        graph: the graph that they are made in.
        made: value and call to the same call of that value.
    """

    graph: fx.Graph
    made: dict[tuple[fx.Node, fx.Node], fx.Node] = field(default_factory=dict)

    def of(self, found: _Sum) -> tuple[fx.Node, fx.Node, int] | None:
        """Return cosines and sines ``[batch or 1, tokens, width / 2]``, and the axis of the heads.

        None where heads have angles of their own, or the two of a pair may have.
        """
        for axis in (1, 2):
            cos, sin = (self._half(angles, found, axis) for angles in (found.cos, found.sin))
            if cos is not None and sin is not None:
                return cos, sin, axis
        return None

    def _half(self, angles: fx.Node, found: _Sum, axis: int) -> fx.Node | None:
        calls: list[fx.Node] = []
        source: fx.Node | None = angles
        while source is not None:
            if _is_half(source, found.vector, axis):
                numbers = _numbered(source)
                wanted = unpaired(numbers, numbers, found.interleaved).unsqueeze(axis)
                twice = made_of(angles, source, numbers, *_PER_NUMBER)
                if twice is not None and torch.equal(twice, wanted):
                    return self._again(source, calls)
            if is_call(source, _PER_NUMBER):
                calls.append(source)
            source = _before(source)
        return None

    def _again(self, value: fx.Node, calls: list[fx.Node]) -> fx.Node:
        """Make calls, the last one first, of another value than theirs."""
        for call in reversed(calls):
            key = value, call
            if key not in self.made:
                args = (value, *call.args[1:])
                self.made[key] = insert_call(
                    self.graph, call.target, args, dict(call.kwargs), before=call, like=call
                )
            value = self.made[key]
        return value


def _is_half(source: fx.Node, vector: fx.Node, axis: int) -> bool:
    """Tell whether a value has a number for each pair of each token; heads are on ``axis``."""
    value, turned = source.meta["val"], vector.meta["val"]
    if not isinstance(value, Tensor) or value.dim() != 3:
        return False
    batch, tokens = str(turned.shape[0]), str(turned.shape[3 - axis])
    sizes = list(map(str, value.shape))
    return sizes[0] in ("1", batch) and sizes[1:] == [tokens, str(turned.shape[-1] // 2)]


def _before(node: fx.Node) -> fx.Node | None:
    """Return the one value that a call moves, or does something to number by number."""
    if is_call(node, _PER_NUMBER):
        first, *others = node.args
        numbers = all(_rank(other) == 0 for other in others if isinstance(other, fx.Node))
        return first if numbers and isinstance(first, fx.Node) else None
    if not is_move(node):
        return None
    values = [one for one in node.all_input_nodes if not _is_size(one)]
    return values[0] if all(same_value(values[0], other) for other in values) else None


def _is_size(node: fx.Node) -> bool:
    return not isinstance(node.meta["val"], Tensor | tuple | list)


def _rank(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.dim() if isinstance(value, Tensor) else 0


def _insert(graph: fx.Graph, found: _Sum, cos: fx.Node, sin: fx.Node, axis: int) -> fx.Node:
    """Put a call in the place of a sum, or of its join with channels that stay."""
    total, vector = _with_rest(found)

    def call(target: Any, *args: Any) -> fx.Node:
        return insert_call(graph, target, args, before=total, like=found.node)

    heads = vector if axis == 1 else call(aten.transpose.int, vector, 1, 2)
    turned = call(torch.ops.modelathe.rotary.default, heads, cos, sin, found.interleaved)
    result = turned if axis == 1 else call(aten.transpose.int, turned, 1, 2)
    total.replace_all_uses_with(result)
    for user in list(result.users) if axis == 2 else ():
        if is_call(user, aten.transpose.int) and user.args[1:] == (1, 2):
            user.replace_all_uses_with(turned)
    return turned


def _with_rest(found: _Sum) -> tuple[fx.Node, fx.Node]:
    """Return the sum and its vector, or the sum with the rest of what the vector is cut from."""
    alone = found.node, found.vector
    source = _before(found.vector)
    if source is not None and not isinstance(source.meta["val"], Tensor):
        source = _before(source)  # of the parts that it was split into
    if source is None or len(found.node.users) != 1:
        return alone
    (join,) = found.node.users
    parts: Any = argument(join, 0, "tensors") if is_call(join, aten.cat.default) else ()
    if len(parts) != 2 or parts[0] is not found.node or not _is_paired(join, source):
        return alone
    numbers = _numbered(source)
    cut = [made_of(part, source, numbers) for part in (found.vector, parts[1])]
    whole = all(part is not None for part in cut) and torch.equal(torch.cat(cut, -1), numbers)
    return (join, source) if whole else alone
