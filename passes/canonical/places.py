"""Where the entries of a value go, through calls that move entries and change none."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from .match import aten, is_call, same_value

FOREIGN = -1  # the place of an entry that comes from somewhere else

_MOVES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.clone.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.repeat_interleave.self_int,
    aten.cat.default,
    aten.stack.default,
)


def is_move(node: fx.Node) -> bool:
    """Tell whether a call gives entries of its inputs and nothing else."""
    return is_call(node, (*_MOVES, operator.getitem))


def places(source: fx.Node, numbers: Tensor) -> dict[fx.Node, Any]:
    """Return, for every value made of ``source`` by moving entries, the number of each entry.

    The calls are run on the numbers, with the graph's symbolic sizes at the values they were traced
    with; what else a ``cat`` joins counts as ``FOREIGN``.

    Args:
        source: a value.
        numbers: int64, one for each entry of it.
    """
    found: dict[fx.Node, Any] = {source: numbers}
    node = source.next
    while node.op != "root":
        if is_move(node) and any(each in found for each in node.all_input_nodes):
            args = fx.node.map_arg(node.args, lambda n: found[n] if n in found else _outside(n))
            args = fx.node.map_aggregate(args, _number)
            assert callable(node.target)
            found[node] = node.target(*args, **node.kwargs)
        node = node.next
    return found


def made_of(node: fx.Node, source: fx.Node, numbers: Tensor, *passed: Any) -> Any:
    """Return the number of the entry of ``source`` that each entry of ``node`` is, or of its minus.

    Args:
        node: a value.
        source: what it may be made of; so may be equal calls of equal values.
        numbers: int64, one for each entry of ``source``; those of its minus are negative.
        passed: calls that do something to each entry of their first operand, to be overlooked.

    Returns:
        None where ``node`` is made of anything else, too, or in another way.
    """
    if same_value(node, source):
        return numbers
    if not isinstance(node.meta["val"], Tensor | tuple | list):
        return _number(node.meta["val"])  # a size
    if not is_move(node) and not is_call(node, (aten.neg.default, *passed)):
        return None
    operands = node.all_input_nodes[:1] if is_call(node, passed) else node.all_input_nodes
    found = {each: made_of(each, source, numbers, *passed) for each in operands}
    if any(part is None for part in found.values()):
        return None
    if is_call(node, passed):
        return found[operands[0]]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
    assert callable(node.target)
    return node.target(*fx.node.map_aggregate(args, _number), **kwargs)


def numbered(value: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return numbers that count the entries along ``axes`` (from 0, in order) and repeat elsewhere.

    Args:
        value: gives the sizes.
        axes: from 0.
    """
    sizes = [_number(size) for size in value.shape]
    counted = [size if axis in axes else 1 for axis, size in enumerate(sizes)]
    return torch.arange(torch.Size(counted).numel()).reshape(counted).expand(sizes)


def constant_along(numbers: Tensor, axes: tuple[int, ...]) -> Tensor | None:
    """Return the numbers without ``axes``, if they are the same all along them.

    ``FOREIGN`` entries are passed over; None where numbers differ, or all are foreign.
    """
    largest = numbers.amax(axes, keepdim=True)
    same = bool(((numbers == largest) | (numbers == FOREIGN)).all())
    return largest.squeeze(axes) if same and bool((largest != FOREIGN).all()) else None


def _outside(node: fx.Node) -> Any:
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return torch.full([_number(size) for size in value.shape], FOREIGN)
    return value


def _number(value: Any) -> Any:
    return int(value.node.hint) if isinstance(value, torch.SymInt) else value
