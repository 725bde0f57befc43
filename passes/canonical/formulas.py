"""Norms and activations that models write out by hand, raised to one call each."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from ...ir import Program, insert_call
from ...ir.calls import argument, is_weight
from .match import (
    ADD,
    MUL,
    POW,
    aten,
    close,
    constant_operand,
    is_call,
    operands,
    same_type,
    same_value,
    scalar_operand,
    through_casts,
)


def raise_norms(program: Program, graph: fx.Graph) -> list[fx.Node]:
    """Raise ``x * rsqrt(mean(x^2) + eps) * g`` to ``rms_norm``, its centred form to ``layer_norm``.

    Conversions to float32 and back around the formula go: the operators compute in float32 inside.
    """
    raised = []
    for node in list(graph.nodes):
        found = _normalized(node)
        if found is None:
            continue
        source, eps, centred = found
        width = source.meta["val"].shape[-1]
        if not isinstance(width, int) or width != node.meta["val"].shape[-1]:
            continue
        end, gain, bias = _affine(node, source, centred)
        if not same_type(end, source):
            continue
        target, args = aten.rms_norm.default, [source, [width], gain, eps]
        if centred:
            target, args = aten.layer_norm.default, [source, [width], gain, bias, eps]
        call = insert_call(graph, target, tuple(args), before=end, like=end)
        end.replace_all_uses_with(call)
        raised.append(call)
    return raised


def _normalized(node: fx.Node) -> tuple[fx.Node, float, bool] | None:
    """Match ``x * rsqrt(mean(x^2, -1) + eps)``; return x, eps, and if it is centred."""
    for centred_value, scale in operands(node, MUL):
        root = _root(scale)
        if root is None:
            continue
        mean_square, eps = root
        inner = _mean_of_square(mean_square)
        if inner is None or not same_value(inner, centred_value):
            continue
        if (centre := _centred(inner)) is not None:
            return through_casts(centre), eps, True
        return through_casts(inner), eps, False
    return None


def _root(node: Any) -> tuple[Any, float] | None:
    """Match ``rsqrt(m + eps)``, or ``pow(m + eps, -0.5)``; return m and eps."""
    if is_call(node, aten.rsqrt.default):
        return scalar_operand(argument(node, 0, "self"), ADD)
    if is_call(node, POW) and argument(node, 1, "exponent") == -0.5:
        return scalar_operand(argument(node, 0, "self"), ADD)
    return None


def _mean_of_square(node: Any) -> fx.Node | None:
    """Match ``mean(x * x, -1, keepdim)``; return x."""
    if not is_call(node, aten.mean.dim) or not _last_kept(node):
        return None
    square = argument(node, 0, "self")
    if is_call(square, POW) and argument(square, 1, "exponent") == 2:
        found = argument(square, 0, "self")
        return found if isinstance(found, fx.Node) else None
    return next((a for a, b in operands(square, MUL) if b is a), None)


def _last_kept(node: fx.Node) -> bool:
    dims = argument(node, 1, "dim")
    rank = argument(node, 0, "self").meta["val"].dim()
    return list(dims) in ([-1], [rank - 1]) and bool(argument(node, 2, "keepdim", False))


def _centred(node: fx.Node) -> fx.Node | None:
    """Match ``x - mean(x, -1, keepdim)``; return x."""
    if not is_call(node, aten.sub.Tensor) or len(node.args) != 2:
        return None
    source, mean = node.args
    if not isinstance(source, fx.Node) or not isinstance(mean, fx.Node):
        return None
    of_source = is_call(mean, aten.mean.dim) and argument(mean, 0, "self") is source
    return source if of_source and _last_kept(mean) else None


def _affine(
    node: fx.Node, source: fx.Node, centred: bool
) -> tuple[fx.Node, fx.Node | None, fx.Node | None]:
    """Follow a normalised value through casts, its gain and its bias; return the last call."""
    width = source.meta["val"].shape[-1]
    end = _through_single_cast(node)
    gain, end = _weight_operand(end, MUL, width)
    bias = None
    if centred:
        bias, end = _weight_operand(end, ADD, width)
    return end, gain, bias


def _through_single_cast(node: fx.Node) -> fx.Node:
    """Step over one dtype conversion if it is all that reads ``node``."""
    if len(node.users) == 1:
        (user,) = node.users
        casts = is_call(user, (aten._to_copy.default, aten.type_as.default))
        if casts and argument(user, 0, "self") is node:
            return user
    return node


def _weight_operand(
    node: fx.Node, targets: tuple[Any, ...], width: int
) -> tuple[fx.Node | None, fx.Node]:
    """Return the weight ``[width]`` that the only reader of ``node`` applies, and the end."""
    if len(node.users) != 1:
        return None, node
    (user,) = node.users
    for value, other in operands(user, targets):
        if value is node and is_weight(other) and list(other.meta["val"].shape) == [width]:
            return other, _through_single_cast(user)
    return None, node


_TANH_SCALE = math.sqrt(2 / math.pi)


def raise_gelus(program: Program, graph: fx.Graph) -> list[fx.Node]:
    """Raise hand-written gelu, with tanh or erf, to one call."""
    raised = []
    for node in list(graph.nodes):
        found = _gelu(node)
        if found is None or not same_type(node, found[0]):
            continue
        source, approximate = found
        call = insert_call(
            graph,
            aten.gelu.default,
            (source,),
            {"approximate": approximate},
            before=node,
            like=node,
        )
        node.replace_all_uses_with(call)
        raised.append(call)
    return raised


def _gelu(node: fx.Node) -> tuple[fx.Node, str] | None:
    """Match ``(x / 2) * (1 + f)`` with f a tanh or erf of x; return x and which."""
    for half, one_plus in operands(node, MUL):
        source = constant_operand(half, MUL, 0.5)
        inner = constant_operand(one_plus, ADD, 1.0)
        if source is not None and inner is not None:
            if is_call(inner, aten.tanh.default) and _tanh_argument(inner, source):
                return source, "tanh"
            if is_call(inner, aten.erf.default) and _erf_argument(inner, source):
                return source, "none"
    return None


def _erf_argument(node: fx.Node, source: fx.Node) -> bool:
    inner = argument(node, 0, "self")
    if is_call(inner, aten.div.Tensor) and isinstance(inner.args[1], float):
        return inner.args[0] is source and close(inner.args[1], math.sqrt(2))
    return constant_operand(inner, MUL, 1 / math.sqrt(2)) is source


def _tanh_argument(node: fx.Node, source: fx.Node) -> bool:
    """Match ``c (x + 0.044715 x^3)``, also written ``c x (1 + 0.044715 x x)``."""
    inner = argument(node, 0, "self")
    plain = constant_operand(inner, MUL, _TANH_SCALE)
    if plain is not None:
        for a, cubic in operands(plain, ADD):
            cube = constant_operand(cubic, MUL, 0.044715)
            if a is source and is_call(cube, POW):
                assert cube is not None
                return cube.args == (source, 3) or cube.args == (source, 3.0)
    for scaled, bracket in operands(inner, MUL):
        if constant_operand(scaled, MUL, _TANH_SCALE) is source:
            quadratic = constant_operand(bracket, ADD, 1.0)
            return quadratic is not None and _is_scaled_square(quadratic, source)
    return False


def _is_scaled_square(node: fx.Node, source: fx.Node) -> bool:
    """Match ``0.044715 x x`` in either grouping."""
    for part, other in operands(node, MUL):
        if constant_operand(part, MUL, 0.044715) is source and other is source:
            return True
    return False
