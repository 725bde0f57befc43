"""Products of integers: rounded activations and 8-bit weights as ONNX Runtime multiplies them.

``MatMulIntegerToFloat`` takes uint8 activations with one scale and int8 weights ``[in, out]`` with
one per column.  A step per token does not fit its one scale, so it multiplies the sums afterwards;
what it is divided by before that is the token's largest number, and the rest is a constant.

Measured on MiniLM, x86 with VNNI: int8 weights take two thirds of the time that uint8 ones do, and
are what ONNX Runtime's own quantiser writes.  Without VNNI their products overflow 16 bits, unless
codes of activations have 7 bits or the session is told ``session.x64quantprecision``, as ours is
there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from ...ir.activations import largest_code, middle_code
from .emitter import Emitter, dtype_of, sizes_of

Handler = Callable[..., Any]
_FLOAT, _INT8, _UINT8 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT8

ROUND = torch.ops.modelathe.round_activations.default
CODES = "activation_codes/"
"""How the names of codes begin; what follows is the name of the call that rounds."""


def _round(
    e: Emitter, node: fx.Node, x: fx.Node, scale: fx.Node | None, zero: fx.Node | None, bits: int
) -> Any:
    """Make the codes, and what they stand for, which is dropped unless something reads it.

    The code of a token of zeros is that of 0 / 0; whatever it is, its product with 0 is 0.
    """
    value = e.tensor(x, _FLOAT)
    if scale is None or zero is None:
        largest = e.op("ReduceMax", e.op("Abs", value), e.builder.ints(-1), keepdims=1)
        e.memory["largest", node] = largest
        value = e.op("Div", value, largest)
        step = e.builder.constant(1 / (middle_code(bits) - 1), _FLOAT)
        middle = e.builder.constant(middle_code(bits), _UINT8)
    else:
        step, middle = e.tensor(scale, _FLOAT), e.value(zero)
    codes = e.op("QuantizeLinear", value, step, middle, dtype=_UINT8)
    if scale is not None and bits < 8:
        codes = e.op("Clip", codes, None, e.builder.constant(largest_code(bits), _UINT8))
    codes.shape = ir.Shape([e.sizes.text(size) for size in sizes_of(x)])
    e.builder.rename(codes, f"{CODES}{node.name}")
    e.memory["codes", node], e.memory["step", node] = codes, step
    e.memory["middle", node] = middle
    result = e.op("DequantizeLinear", codes, step, middle, dtype=_FLOAT)
    if scale is None:
        result = e.op("Mul", result, e.memory["largest", node])
    return e.builder.cast(result, dtype_of(node))


def multiplies_integers(x: fx.Node, bits: int, group_size: int, in_features: int) -> bool:
    """Tell whether a quantised linear on ``x`` is a product of integers and one scale a row."""
    return x.target is ROUND and bits == 8 and group_size in (-1, in_features)


def product(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    codes: fx.Node,
    scales: fx.Node,
    zeros: fx.Node | None,
    bias: fx.Node | None,
) -> ir.Value:
    """Return the linear of rounded activations and 8-bit weights with one scale a row."""
    shift = None if bias is None else e.tensor(bias, _FLOAT)
    largest = e.memory.get(("largest", x))
    result = e.op(
        "MatMulIntegerToFloat",
        e.memory["codes", x],
        _columns(e, codes),
        e.memory["step", x],
        _row(e, scales, "one a column", _FLOAT, lambda t: t.float()),
        e.memory["middle", x],
        None if zeros is None else _row(e, zeros, "int8", _INT8, _signed),
        shift if largest is None else None,
        domain="com.microsoft",
        dtype=_FLOAT,
    )
    if largest is not None:
        result = e.op("Mul", result, largest)
        result = result if shift is None else e.op("Add", result, shift)
    return e.builder.cast(result, dtype_of(node))


def _columns(e: Emitter, codes: fx.Node) -> ir.Value:
    """Return weight codes ``[n, k]`` as ``int8 [k, n]``."""
    n, k = (int(size) for size in sizes_of(codes))
    return e.weights.derived("int8", (str(codes.target),), _INT8, (k, n), lambda t: _signed(t).T)


def _row(
    e: Emitter,
    part: fx.Node,
    form: str,
    dtype: ir.DataType,
    make: Callable[[Tensor], Tensor],
) -> ir.Value:
    """Return a part of a weight ``[n, 1]`` as ``[n]``."""
    shape = (int(sizes_of(part)[0]),)
    return e.weights.derived(form, (str(part.target),), dtype, shape, lambda t: make(t).reshape(-1))


def _signed(codes: Tensor) -> Tensor:
    """Return uint8 codes less 128, as int8."""
    return (codes ^ 128).view(torch.int8)


HANDLERS: dict[Any, Handler] = {ROUND: _round}
