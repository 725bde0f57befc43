"""Small matchers for hand-written formulas: calls, constants, operands in either order."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.calls import argument

aten = torch.ops.aten
Pair = tuple[fx.Node, Any]

MUL = (aten.mul.Tensor, aten.mul.Scalar)
ADD = (aten.add.Tensor, aten.add.Scalar)
POW = (aten.pow.Tensor_Scalar,)


def is_call(node: object, targets: tuple[Any, ...] | Any) -> bool:
    """Tell whether ``node`` calls one of ``targets``."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return node.target in (targets if isinstance(targets, tuple) else (targets,))


def operands(node: object, targets: tuple[Any, ...]) -> list[Pair]:
    """Return the two operands of a commutative call in both orders; none for another call."""
    if not is_call(node, targets):
        return []
    assert isinstance(node, fx.Node)
    if len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
        return []
    a, b = node.args
    return [(x, y) for x, y in ((a, b), (b, a)) if isinstance(x, fx.Node)]


def constant_operand(node: object, targets: tuple[Any, ...], value: float) -> fx.Node | None:
    """Return the other operand of a commutative call that has the number ``value``."""
    for operand, number in operands(node, targets):
        if isinstance(number, int | float) and close(number, value):
            return operand
    return None


def scalar_operand(node: object, targets: tuple[Any, ...]) -> tuple[fx.Node, float] | None:
    """Return the tensor and the number of a commutative call of both."""
    for operand, number in operands(node, targets):
        if isinstance(number, int | float):
            return operand, float(number)
    return None


def close(found: float, wanted: float) -> bool:
    """Tell whether two written constants are the same number, to eight digits at least.

    With fewer, outputs would move by more than rounding explains.
    """
    return abs(found - wanted) <= 1.5e-9 * max(1.0, abs(wanted))


def through_casts(node: Any) -> Any:
    """Return the value that a chain of dtype conversions started from."""
    while is_call(node, (aten._to_copy.default, aten.type_as.default)):
        node = argument(node, 0, "self")
    return node


def same_value(a: object, b: object) -> bool:
    """Tell whether two arguments are one value: the same, or equal calls of the same values."""
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return type(a) is type(b) and bool(a == b)
    if a is b or a.op != "call_function" or a.target is not b.target:
        return a is b
    random = torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ())
    if random or a.kwargs != b.kwargs or len(a.args) != len(b.args):
        return False
    return all(same_value(x, y) for x, y in zip(a.args, b.args, strict=True))


def same_type(a: fx.Node, b: fx.Node) -> bool:
    """Tell whether two values have one dtype and one shape."""
    left, right = a.meta["val"], b.meta["val"]
    if not (isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)):
        return False
    return left.dtype == right.dtype and same_sizes(left, right)


def same_sizes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether two values have one shape, symbols compared by what they are."""
    return list(map(str, a.shape)) == list(map(str, b.shape))
