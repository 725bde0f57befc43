"""Where the channels of a value are, before and after calls that treat all channels alike."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from ...ir.calls import argument
from ..canonical.match import aten, is_call

_REARRANGED = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.clone.default,
    aten.contiguous.default,
)
_POOLED = {aten.adaptive_avg_pool1d.default: 1, aten.adaptive_avg_pool2d.default: 2}


def carried(call: fx.Node, source: fx.Node, axis: int) -> int | None:
    """Return the axis of a call's value that holds the channels of its input; None for none.

    Only for calls that commute with every affine map of the channels, ``f(a x + c) = a f(x) + c``:
    those that move or drop entries, and means over other axes.

    Args:
        call: the call.
        source: one of its inputs.
        axis: where the channels of ``source`` are, from 0.
    """
    if call.op != "call_function" or argument(call, 0, "self") is not source:
        return None
    if not isinstance(call.meta["val"], Tensor) or call.meta["val"].dtype != _value(source).dtype:
        return None
    order = permutation(call)
    if order is not None:
        return order.index(axis)
    if is_call(call, _REARRANGED):
        return _rearranged(_value(source), _value(call), axis)
    if is_call(call, (aten.slice.Tensor, aten.select.int, aten.mean.dim)):
        return _reduced(call, _value(source), axis)
    if is_call(call, aten.expand.default):
        later = axis + _value(call).dim() - _value(source).dim()
        return later if _size(_value(call), later) == _size(_value(source), axis) else None
    if is_call(call, aten.pad.default):
        return axis if _keeps_channels(call, _value(source), axis) else None
    if is_call(call, aten.index.Tensor):
        return _indexed(call, _value(source), axis)
    if call.target in _POOLED:
        return axis if axis < _value(source).dim() - _POOLED[call.target] else None
    return None


def origin(call: fx.Node, axis: int) -> tuple[fx.Node, int] | None:
    """Return the input of a call that ``carried`` takes to ``axis`` of its value, and its axis."""
    if call.op != "call_function":
        return None
    source = argument(call, 0, "self")
    if not isinstance(source, fx.Node) or not isinstance(source.meta["val"], Tensor):
        return None
    found = [i for i in range(_value(source).dim()) if carried(call, source, i) == axis]
    return (source, found[0]) if found else None


def permutation(call: fx.Node) -> list[int] | None:
    """Return the axes of the input in the order of the result, for a call that permutes them."""
    if not is_call(call, (aten.transpose.int, aten.permute.default, aten.t.default)):
        return None
    order = list(range(_value(call).dim()))
    if is_call(call, aten.permute.default):
        return [order[int(axis)] for axis in argument(call, 1, "dims")]
    if is_call(call, aten.t.default):
        return order[::-1]
    first, second = int(argument(call, 1, "dim0")), int(argument(call, 2, "dim1"))
    order[first], order[second] = order[second], order[first]
    return order


def unpermuted(value: fx.Node) -> tuple[fx.Node, tuple[int, ...]]:
    """Return what a value is a permutation of, and the order: ``value = root.permute(order)``."""
    order = list(range(_value(value).dim()))
    while (inner := permutation(value)) is not None:
        order = [inner[axis] for axis in order]
        value = argument(value, 0, "self")
    return value, tuple(order)


def _value(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def _size(value: Tensor, axis: int) -> str:
    return str(value.shape[axis])


def _rearranged(before: Tensor, after: Tensor, axis: int) -> int | None:
    """Return the axis of ``after``, the same numbers in the same order, that ``axis`` became."""
    behind = str(math.prod(before.shape[axis + 1 :]))
    for later in range(after.dim()):
        alike = _size(after, later) == _size(before, axis)
        if alike and str(math.prod(after.shape[later + 1 :])) == behind:
            return later
    return None


def _reduced(call: fx.Node, source: Tensor, axis: int) -> int | None:
    """Return the axis after a slice, a selection or a mean along others."""
    dims: Any = argument(call, 1, "dim", 0)
    numbers = [dims] if isinstance(dims, int) else (dims or range(source.dim()))
    along = [int(number) % source.dim() for number in numbers]
    if axis in along:
        return None
    kept = is_call(call, aten.slice.Tensor)
    if is_call(call, aten.mean.dim):
        kept = bool(argument(call, 2, "keepdim", False))
    return axis if kept else axis - sum(d < axis for d in along)


def _keeps_channels(call: fx.Node, source: Tensor, axis: int) -> bool:
    """Tell whether a padding adds nothing, or only copies of entries along other axes."""
    amounts = list(argument(call, 1, "pad"))
    if not any(amounts):
        return True
    copies = argument(call, 2, "mode", "constant") != "constant"
    return copies and axis < source.dim() - len(amounts) // 2


def _indexed(call: fx.Node, source: Tensor, axis: int) -> int | None:
    """Return the axis after a look-up along the first axes; the last one stays last."""
    last = axis == source.dim() - 1
    if last and len(list(argument(call, 1, "indices"))) <= axis:
        return _value(call).dim() - 1
    return None
