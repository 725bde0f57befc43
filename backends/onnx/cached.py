"""Translations of cached keys and values that are stored as codes; all of standard operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from ...ir.cache import SMALLEST_RANGE, step_factor
from .builder import onnx_dtype, stored_dtype
from .emitter import Emitter, dtype_of, sizes_of, torch_dtype

Handler = Callable[..., Any]
_UINT8 = ir.DataType.UINT8


def _quantize(e: Emitter, node: fx.Node, x: fx.Node, bits: int) -> Any:
    """Return codes, scales and zero points; scales are rounded as they will be stored."""
    kept = stored_dtype(torch_dtype(x))
    dtype = ir.DataType.DOUBLE if kept == ir.DataType.DOUBLE else ir.DataType.FLOAT
    value = e.tensor(x, dtype)
    number, axis = e.builder.constant, e.builder.ints(-1)
    below = e.op("Relu", e.op("Neg", e.op("ReduceMin", value, axis, keepdims=1)))
    above = e.op("ReduceMax", value, axis, keepdims=1)
    above = e.op("Max", above, number(SMALLEST_RANGE, dtype))
    factor = number(step_factor(bits, torch_dtype(x)), dtype)
    stored = e.builder.cast(e.op("Mul", e.op("Add", below, above), factor), kept)
    scales = e.builder.cast(stored, dtype)
    zeros = _rounded(e, below, scales, None, 1, 255)
    codes = _rounded(e, value, scales, zeros, int(sizes_of(x)[-1]), (1 << bits) - 1)
    return _packed(e, codes, bits), e.builder.cast(stored, dtype_of(x)), zeros


def _rounded(
    e: Emitter, value: ir.Value, scales: ir.Value, zeros: ir.Value | None, width: int, largest: int
) -> ir.Value:
    """Return ``clip(round(x / scale) + zero, 0, largest)`` as uint8."""
    number, dtype = e.builder.constant, scales.dtype
    assert dtype is not None
    if e.builder.opset >= 21 and dtype == ir.DataType.FLOAT:
        codes = e.op(  # one call, four times as fast
            "QuantizeLinear", value, scales, zeros, dtype=_UINT8, axis=-1, block_size=width
        )
        return codes if largest == 255 else e.op("Clip", codes, None, number(largest, _UINT8))
    whole = e.op("Round", e.op("Div", value, scales))
    if zeros is not None:
        whole = e.op("Add", whole, e.builder.cast(zeros, dtype))
    limits = (number(limit, dtype) for limit in (0, largest))
    return e.builder.cast(e.op("Clip", whole, *limits), _UINT8)


def _packed(e: Emitter, codes: ir.Value, bits: int) -> ir.Value:
    """Return codes packed in planes, low bits first."""
    if bits == 8:
        return codes
    planes = e.builder.multi("Split", codes, count=8 // bits, axis=-1, num_outputs=8 // bits)
    packed = planes[0]
    packed.dtype = _UINT8
    for place, plane in enumerate(planes[1:], 1):
        plane.dtype = _UINT8
        shift = e.builder.constant(place * bits, _UINT8)
        packed = e.op("BitwiseOr", packed, e.op("BitShift", plane, shift, direction="LEFT"))
    return packed


def _dequantize(
    e: Emitter,
    node: fx.Node,
    codes: fx.Node,
    scales: fx.Node,
    zeros: fx.Node,
    newest: fx.Node,
    bits: int,
) -> Any:
    """Return ``(code - zero) * scale``; two cheap calls, which beat ``DequantizeLinear``."""
    dtype = onnx_dtype(torch_dtype(scales))
    levels = e.builder.cast(_unpacked(e, e.value(codes), bits), dtype)
    return e.op("Mul", e.op("Sub", levels, e.tensor(zeros, dtype)), e.value(scales))


def _unpacked(e: Emitter, packed: ir.Value, bits: int) -> ir.Value:
    if bits == 8:
        return packed
    mask = e.builder.constant((1 << bits) - 1, _UINT8)
    planes = []
    for place in range(8 // bits):
        shift = e.builder.constant(place * bits, _UINT8)
        plane = e.op("BitShift", packed, shift, direction="RIGHT") if place else packed
        planes.append(plane if place == 8 // bits - 1 else e.op("BitwiseAnd", plane, mask))
    return e.op("Concat", *planes, axis=-1)


HANDLERS: dict[Any, Handler] = {
    torch.ops.modelathe.quantize_cache.default: _quantize,
    torch.ops.modelathe.dequantize_cache.default: _dequantize,
}
