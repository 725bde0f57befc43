"""Translations of calls that work number by number, with torch's rules for mixed dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from .builder import onnx_dtype
from .emitter import Emitter, Operand, dtype_of, sizes_of, torch_dtype

aten = torch.ops.aten
Handler = Callable[..., Any]
_BOOL = ir.DataType.BOOL


def _joint_dtype(*operands: Operand) -> ir.DataType:
    """Return the dtype in which torch compares or combines operands."""
    return onnx_dtype(torch.result_type(*(_sample(operand) for operand in _pair(operands))))


def _pair(operands: tuple[Operand, ...]) -> tuple[Operand, Operand]:
    return operands if len(operands) == 2 else (operands[0], operands[0])


def _sample(operand: Operand) -> Any:
    """Return a value without data of the operand's dtype and kind (tensor, scalar or number)."""
    if not isinstance(operand, fx.Node):
        return operand
    value = operand.meta["val"]
    if not isinstance(value, torch.Tensor):
        return {torch.bool: True, torch.int64: 1}.get(torch_dtype(operand), 1.0)
    return torch.empty((1,) * value.dim(), dtype=value.dtype, device="meta")


def arithmetic(kind: str) -> Handler:
    """Return the translation of a call whose operands are made the dtype of the result."""

    def translate(e: Emitter, node: fx.Node, x: Operand, y: Operand, alpha: Operand = 1) -> Any:
        dtype = dtype_of(node)
        second = e.tensor(y, dtype)
        if alpha != 1:
            second = e.op("Mul", second, e.tensor(alpha, dtype))
        if dtype == _BOOL:
            kind_of_bool = {"Add": "Or", "Mul": "And"}[kind]
            return e.op(kind_of_bool, e.tensor(x, dtype), second)
        return e.op(kind, e.tensor(x, dtype), second)

    return translate


def _rsub(e: Emitter, node: fx.Node, x: Operand, y: Operand, alpha: Operand = 1) -> Any:
    dtype = dtype_of(node)
    first = e.tensor(x, dtype)
    if alpha != 1:
        first = e.op("Mul", first, e.tensor(alpha, dtype))
    return e.op("Sub", e.tensor(y, dtype), first)


def comparison(kind: str) -> Handler:
    """Return the translation of a comparison."""

    def translate(e: Emitter, node: fx.Node, x: Operand, y: Operand) -> Any:
        dtype = _joint_dtype(x, y)
        if dtype == _BOOL and kind != "Equal":
            dtype = ir.DataType.INT32
        return e.op(kind, e.tensor(x, dtype), e.tensor(y, dtype), dtype=_BOOL)

    return translate


def _not_equal(e: Emitter, node: fx.Node, x: Operand, y: Operand) -> Any:
    return e.op("Not", comparison("Equal")(e, node, x, y))


def _bits(logical: str, bitwise: str) -> Handler:
    """Return the translation of ``&``, ``|`` and ``^``, which are logical on booleans."""

    def translate(e: Emitter, node: fx.Node, x: Operand, y: Operand) -> Any:
        dtype = dtype_of(node)
        return e.op(logical if dtype == _BOOL else bitwise, e.tensor(x, dtype), e.tensor(y, dtype))

    return translate


def _logical(kind: str) -> Handler:
    def translate(e: Emitter, node: fx.Node, *operands: Operand) -> Any:
        return e.op(kind, *(e.tensor(x, _BOOL) for x in operands))

    return translate


def _bitwise_not(e: Emitter, node: fx.Node, x: fx.Node) -> Any:
    return e.op("Not" if dtype_of(node) == _BOOL else "BitwiseNot", e.value(x))


def unary(kind: str, **attributes: Any) -> Handler:
    """Return the translation of a function of one operand, computed in the result's dtype."""

    def translate(e: Emitter, node: fx.Node, x: fx.Node) -> Any:
        return e.op(kind, e.tensor(x, dtype_of(node)), **attributes)

    return translate


def _div(
    e: Emitter, node: fx.Node, x: Operand, y: Operand, rounding_mode: str | None = None
) -> Any:
    dtype = dtype_of(node)
    a, b = e.tensor(x, dtype), e.tensor(y, dtype)
    if rounding_mode is None:
        return e.op("Div", a, b)
    whole = not torch_dtype(node).is_floating_point
    if rounding_mode == "floor":
        if whole:
            return e.op("Div", e.op("Sub", a, e.op("Mod", a, b)), b)  # Mod has the sign of b
        return e.op("Floor", e.op("Div", a, b))
    quotient = e.op("Div", a, b)  # truncates on integers
    if whole:
        return quotient
    return e.op("Mul", e.op("Sign", quotient), e.op("Floor", e.op("Abs", quotient)))


def _floor_divide(e: Emitter, node: fx.Node, x: Operand, y: Operand) -> Any:
    return _div(e, node, x, y, "floor")


def _remainder(e: Emitter, node: fx.Node, x: Operand, y: Operand) -> Any:
    dtype = dtype_of(node)
    a, b = e.tensor(x, dtype), e.tensor(y, dtype)
    if not torch_dtype(node).is_floating_point:
        return e.op("Mod", a, b)
    return e.op("Sub", a, e.op("Mul", e.op("Floor", e.op("Div", a, b)), b))


def _pow(e: Emitter, node: fx.Node, x: Operand, y: Operand) -> Any:
    dtype = dtype_of(node)
    if y == 0.5:
        return e.op("Sqrt", e.tensor(x, dtype))
    if y == 1:
        return e.tensor(x, dtype)
    return e.op("Pow", e.tensor(x, dtype), e.tensor(y, dtype))


def _square(e: Emitter, node: fx.Node, x: fx.Node) -> Any:
    value = e.tensor(x, dtype_of(node))
    return e.op("Mul", value, value)


def _rsqrt(e: Emitter, node: fx.Node, x: fx.Node) -> Any:
    return e.op("Reciprocal", e.op("Sqrt", e.tensor(x, dtype_of(node))))


def _silu(e: Emitter, node: fx.Node, x: fx.Node) -> Any:
    value = e.value(x)
    return e.op("Mul", value, e.op("Sigmoid", value))


def _gelu(e: Emitter, node: fx.Node, x: fx.Node, approximate: str = "none") -> Any:
    value, dtype = e.value(x), dtype_of(node)
    if e.builder.opset >= 20:
        return e.op("Gelu", value, approximate=approximate)

    def number(constant: float) -> ir.Value:
        return e.builder.constant(constant, dtype)

    if approximate == "tanh":
        cubic = e.op("Mul", e.op("Pow", value, number(3.0)), number(0.044715))
        inner = e.op("Mul", e.op("Add", value, cubic), number(math.sqrt(2 / math.pi)))
        step = e.op("Tanh", inner)
    else:
        step = e.op("Erf", e.op("Div", value, number(math.sqrt(2))))
    return e.op("Mul", e.op("Mul", value, e.op("Add", step, number(1.0))), number(0.5))


def _clamp(
    e: Emitter, node: fx.Node, x: fx.Node, low: Operand | None = None, high: Operand | None = None
) -> Any:
    dtype = dtype_of(node)
    value = e.tensor(x, dtype)
    if low is not None:
        value = e.op("Max", value, e.tensor(low, dtype))
    if high is not None:
        value = e.op("Min", value, e.tensor(high, dtype))
    return value


def _relu6(e: Emitter, node: fx.Node, x: fx.Node) -> Any:
    return _clamp(e, node, x, 0, 6)


def _hardtanh(e: Emitter, node: fx.Node, x: fx.Node, low: float = -1.0, high: float = 1.0) -> Any:
    dtype = dtype_of(node)
    return e.op("Clip", e.value(x), e.builder.constant(low, dtype), e.builder.constant(high, dtype))


def _softplus(
    e: Emitter, node: fx.Node, x: fx.Node, beta: float = 1.0, threshold: float = 20.0
) -> Any:
    dtype = dtype_of(node)
    value = e.value(x)
    if beta == 1:
        return e.op("Softplus", value)  # differs from the identity by less than e**-threshold
    scale = e.builder.constant(beta, dtype)
    return e.op("Div", e.op("Softplus", e.op("Mul", value, scale)), scale)


def _where(e: Emitter, node: fx.Node, condition: fx.Node, x: Operand, y: Operand) -> Any:
    dtype = dtype_of(node)
    return e.op(
        "Where", e.tensor(condition, _BOOL), e.tensor(x, dtype), e.tensor(y, dtype), dtype=dtype
    )


def _masked_fill(e: Emitter, node: fx.Node, x: fx.Node, mask: fx.Node, value: Operand) -> Any:
    return _where(e, node, mask, value, x)


def cast(e: Emitter, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> Any:
    """Translate any conversion of dtype (and of device, layout and memory format)."""
    return e.tensor(x, dtype_of(node))


def same(e: Emitter, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> Any:
    """Translate a call that gives back its first operand."""
    return e.value(x)


def _fill_like(e: Emitter, node: fx.Node, x: fx.Node, value: Operand, **_: Any) -> Any:
    return full(e, node, value)


def full(e: Emitter, node: fx.Node, value: Operand) -> ir.Value:
    """Return one number repeated to the sizes of ``node``."""
    sizes = sizes_of(node)
    number = e.tensor(value, dtype_of(node))
    if not sizes:
        return number
    return e.op("Expand", number, e.shape(sizes))


def _full(e: Emitter, node: fx.Node, size: Any, value: Operand, **_: Any) -> Any:
    return full(e, node, value)


def _filled(number: int) -> Handler:
    def translate(e: Emitter, node: fx.Node, *_: Any, **__: Any) -> Any:
        return full(e, node, number)

    return translate


def _new_full(e: Emitter, node: fx.Node, x: fx.Node, size: Any, value: Operand, **_: Any) -> Any:
    return full(e, node, value)


def _scalar_tensor(e: Emitter, node: fx.Node, value: Operand, **_: Any) -> Any:
    return e.tensor(value, dtype_of(node))


HANDLERS: dict[Any, Handler] = {
    aten.add.Tensor: arithmetic("Add"),
    aten.add.Scalar: arithmetic("Add"),
    aten.sub.Tensor: arithmetic("Sub"),
    aten.sub.Scalar: arithmetic("Sub"),
    aten.rsub.Tensor: _rsub,
    aten.rsub.Scalar: _rsub,
    aten.mul.Tensor: arithmetic("Mul"),
    aten.mul.Scalar: arithmetic("Mul"),
    aten.minimum.default: arithmetic("Min"),
    aten.maximum.default: arithmetic("Max"),
    aten.min.other: arithmetic("Min"),
    aten.max.other: arithmetic("Max"),
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
    aten.div.Tensor_mode: _div,
    aten.div.Scalar_mode: _div,
    aten.floor_divide.default: _floor_divide,
    aten.remainder.Scalar: _remainder,
    aten.remainder.Tensor: _remainder,
    aten.pow.Tensor_Scalar: _pow,
    aten.pow.Tensor_Tensor: _pow,
    aten.pow.Scalar: _pow,
    aten.eq.Scalar: comparison("Equal"),
    aten.eq.Tensor: comparison("Equal"),
    aten.ne.Scalar: _not_equal,
    aten.ne.Tensor: _not_equal,
    aten.lt.Scalar: comparison("Less"),
    aten.lt.Tensor: comparison("Less"),
    aten.le.Scalar: comparison("LessOrEqual"),
    aten.le.Tensor: comparison("LessOrEqual"),
    aten.gt.Scalar: comparison("Greater"),
    aten.gt.Tensor: comparison("Greater"),
    aten.ge.Scalar: comparison("GreaterOrEqual"),
    aten.ge.Tensor: comparison("GreaterOrEqual"),
    aten.bitwise_and.Tensor: _bits("And", "BitwiseAnd"),
    aten.bitwise_and.Scalar: _bits("And", "BitwiseAnd"),
    aten.__and__.Tensor: _bits("And", "BitwiseAnd"),
    aten.__and__.Scalar: _bits("And", "BitwiseAnd"),
    aten.bitwise_or.Tensor: _bits("Or", "BitwiseOr"),
    aten.bitwise_or.Scalar: _bits("Or", "BitwiseOr"),
    aten.__or__.Tensor: _bits("Or", "BitwiseOr"),
    aten.__or__.Scalar: _bits("Or", "BitwiseOr"),
    aten.bitwise_xor.Tensor: _bits("Xor", "BitwiseXor"),
    aten.bitwise_xor.Scalar: _bits("Xor", "BitwiseXor"),
    aten.__xor__.Tensor: _bits("Xor", "BitwiseXor"),
    aten.__xor__.Scalar: _bits("Xor", "BitwiseXor"),
    aten.bitwise_not.default: _bitwise_not,
    aten.logical_and.default: _logical("And"),
    aten.logical_or.default: _logical("Or"),
    aten.logical_not.default: _logical("Not"),
    aten.abs.default: unary("Abs"),
    aten.ceil.default: unary("Ceil"),
    aten.cos.default: unary("Cos"),
    aten.erf.default: unary("Erf"),
    aten.exp.default: unary("Exp"),
    aten.floor.default: unary("Floor"),
    aten.log.default: unary("Log"),
    aten.neg.default: unary("Neg"),
    aten.reciprocal.default: unary("Reciprocal"),
    aten.relu.default: unary("Relu"),
    aten.round.default: unary("Round"),
    aten.rsqrt.default: _rsqrt,
    aten.square.default: _square,
    aten.sigmoid.default: unary("Sigmoid"),
    aten.sign.default: unary("Sign"),
    aten.sin.default: unary("Sin"),
    aten.sqrt.default: unary("Sqrt"),
    aten.tanh.default: unary("Tanh"),
    aten.silu.default: _silu,
    aten.gelu.default: _gelu,
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    aten.clamp_min.default: _clamp,
    aten.hardtanh.default: _hardtanh,
    aten.relu6.default: _relu6,
    aten.softplus.default: _softplus,
    aten.where.self: _where,
    aten.where.Scalar: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten._to_copy.default: cast,
    aten.to.dtype: cast,
    aten.to.dtype_layout: cast,
    aten.to.other: cast,
    aten.to.device: cast,
    aten.type_as.default: cast,
    aten.clone.default: same,
    aten.contiguous.default: same,
    aten.alias.default: same,
    aten.detach.default: same,
    aten.detach_.default: same,
    aten.dropout.default: same,
    aten.lift_fresh_copy.default: same,
    aten.full.default: _full,
    aten.full_like.default: _fill_like,
    aten.new_full.default: _new_full,
    aten.fill.Scalar: _fill_like,
    aten.fill.Tensor: _fill_like,
    aten.scalar_tensor.default: _scalar_tensor,
    aten.zeros.default: _filled(0),
    aten.zeros_like.default: _filled(0),
    aten.new_zeros.default: _filled(0),
    aten.empty.memory_format: _filled(0),
    aten.empty_like.default: _filled(0),
    aten.new_empty.default: _filled(0),
    aten.ones.default: _filled(1),
    aten.ones_like.default: _filled(1),
    aten.new_ones.default: _filled(1),
}
