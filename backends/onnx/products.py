"""Translations of matrix products, convolutions and table look-ups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from .emitter import Emitter, Operand, dtype_of, rank_of, sizes_of

aten = torch.ops.aten
Handler = Callable[..., Any]


def _linear(
    e: Emitter, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None
) -> Any:
    product = e.op("MatMul", e.value(x), _right(e, weight))
    return product if bias is None else e.op("Add", product, e.value(bias))


def _right(e: Emitter, weight: fx.Node) -> ir.Value:
    """Return the weight of a linear as ``[in, out]``.

    A weight that only linears read is stored that way.  One that has other readers (a tied
    embedding) is stored once, as it is: ONNX Runtime fuses ``Transpose`` into the product, which
    takes no more time or memory than the stored form.
    """
    if weight.op != "get_attr":
        return e.op("Transpose", e.value(weight), perm=[1, 0])
    name = str(weight.target)
    if name in e.transposed:
        return e.weights.transposed(name)
    key = ("transposed", name)
    if key not in e.memory:
        e.memory[key] = e.op("Transpose", e.value(weight), perm=[1, 0])
    return e.memory[key]


def readers_are_linears(nodes: Sequence[fx.Node]) -> bool:
    """Tell whether each ``get_attr`` node (of one weight) is read by linears only."""
    return all(
        user.target is aten.linear.default
        and user.args[1] is node
        and node not in (user.args[0], *user.args[2:])
        for node in nodes
        for user in node.users
    )


def _addmm(
    e: Emitter,
    node: fx.Node,
    bias: fx.Node,
    x: fx.Node,
    y: fx.Node,
    beta: float = 1,
    alpha: float = 1,
) -> Any:
    values = e.value(x), e.value(y), e.value(bias)
    return e.op("Gemm", *values, beta=float(beta), alpha=float(alpha))


def _matmul(e: Emitter, node: fx.Node, x: fx.Node, y: fx.Node) -> Any:
    return e.op("MatMul", e.value(x), e.value(y))


def _baddbmm(
    e: Emitter,
    node: fx.Node,
    bias: fx.Node,
    x: fx.Node,
    y: fx.Node,
    beta: float = 1,
    alpha: float = 1,
) -> Any:
    dtype = dtype_of(node)
    product = e.op("MatMul", e.value(x), e.value(y))
    if alpha != 1:
        product = e.op("Mul", product, e.builder.constant(alpha, dtype))
    if beta == 0:
        return product
    added = e.tensor(bias, dtype)
    if beta != 1:
        added = e.op("Mul", added, e.builder.constant(beta, dtype))
    return e.op("Add", added, product)


def _einsum(e: Emitter, node: fx.Node, equation: str, operands: Sequence[fx.Node], **_: Any) -> Any:
    return e.op("Einsum", *(e.value(x) for x in operands), equation=equation.replace(" ", ""))


def _embedding(e: Emitter, node: fx.Node, weight: fx.Node, ids: fx.Node, *_: Any, **__: Any) -> Any:
    return e.op("Gather", e.value(weight), e.value(ids), axis=0)


def _convolution(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    rank = rank_of(weight) - 2
    if rank_of(x) != rank + 2:  # without a batch
        return NotImplemented
    kernel = [int(size) for size in sizes_of(weight)[2:]]
    spread = _row(dilation, rank)
    return e.op(
        "Conv",
        e.value(x),
        e.value(weight),
        None if bias is None else e.value(bias),
        kernel_shape=kernel,
        strides=_row(stride, rank),
        dilations=spread,
        group=groups,
        pads=_pads(padding, kernel, spread),
    )


def _pads(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return ONNX's pads, all of the fronts and then all of the backs."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        front = [size // 2 for size in total]  # torch puts the odd one at the back
        return [*front, *(size - half for size, half in zip(total, front, strict=True))]
    sides = _row(padding, len(kernel))
    return [*sides, *sides]


def _row(value: Any, count: int) -> list[int]:
    """Return a setting per axis: torch takes one number, or a row of one, for all axes."""
    row = [value] if isinstance(value, int) else [int(v) for v in value]
    return row * count if len(row) == 1 else row


def _any_convolution(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    if not transposed:
        return _convolution(e, node, x, weight, bias, stride, padding, dilation, groups)
    rank = rank_of(weight) - 2
    spread, kernel = _row(dilation, rank), [int(size) for size in sizes_of(weight)[2:]]
    return e.op(
        "ConvTranspose",
        e.value(x),
        e.value(weight),
        None if bias is None else e.value(bias),
        kernel_shape=kernel,
        strides=_row(stride, rank),
        dilations=spread,
        group=groups,
        pads=_pads(padding, kernel, spread),
        output_padding=_row(output_padding, rank),
    )


def _max_pool(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Any:
    rank = rank_of(x) - 2
    sides = _row(padding, rank)
    return e.op(
        "MaxPool",
        e.value(x),
        kernel_shape=_row(kernel, rank),
        strides=_row(stride or kernel, rank),
        pads=[*sides, *sides],
        dilations=_row(dilation, rank),
        ceil_mode=int(ceil_mode),
    )


def _adaptive_average(e: Emitter, node: fx.Node, x: fx.Node, size: Any) -> Any:
    rank = rank_of(node) - 2
    if any(part != 1 for part in _row(size, rank)):
        return NotImplemented
    return e.op("ReduceMean", e.value(x), e.builder.ints(*range(2, 2 + rank)), keepdims=1)


def _dot(e: Emitter, node: fx.Node, x: Operand, y: Operand) -> Any:
    dtype = dtype_of(node)
    return e.op("MatMul", e.tensor(x, dtype), e.tensor(y, dtype))


HANDLERS: dict[Any, Handler] = {
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mv.default: _dot,
    aten.matmul.default: _matmul,
    aten.baddbmm.default: _baddbmm,
    aten.einsum.default: _einsum,
    aten.embedding.default: _embedding,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.conv1d.padding: _convolution,
    aten.conv2d.padding: _convolution,
    aten.convolution.default: _any_convolution,
    aten.max_pool2d.default: _max_pool,
    aten.adaptive_avg_pool1d.default: _adaptive_average,
    aten.adaptive_avg_pool2d.default: _adaptive_average,
}
