"""Translations of normalisations, softmax and reductions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from .builder import onnx_dtype
from .emitter import Emitter, axis_of, dtype_of, rank_of, sizes_of
from .sizes import Size

aten = torch.ops.aten
Handler = Callable[..., Any]


def _layer_norm(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    shape: Sequence[int],
    gain: fx.Node | None = None,
    bias: fx.Node | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    value = e.value(x)
    _keep_apart(value)
    return e.op(
        "LayerNormalization",
        value,
        _gain(e, node, gain, shape),
        None if bias is None else e.value(bias),
        axis=-len(shape),
        epsilon=eps,
    )


def _keep_apart(value: ir.Value) -> None:
    """Write the sum that a norm reads as ``Sum``, which ONNX Runtime does not fuse with the norm.

    Its fused kernel on processors takes 5 times as long as a sum and a norm (measured with 1.32 on
    128 tokens of 384 numbers, one thread; equal for 1 token).
    """
    node = value.producer()
    if node is not None and node.op_type == "Add" and value.dtype == ir.DataType.FLOAT:
        node.op_type = "Sum"


def _gain(e: Emitter, node: fx.Node, gain: fx.Node | None, shape: Sequence[Size]) -> ir.Value:
    """Return a norm's gain, or ones: ONNX's norms insist on one."""
    if gain is not None:
        return e.value(gain)
    ones = e.builder.constant([1] * int(shape[-1]), dtype_of(node))
    return ones if len(shape) == 1 else e.op("Expand", ones, e.shape(shape))


def _rms_norm(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    shape: Sequence[int],
    gain: fx.Node | None = None,
    eps: float | None = None,
) -> Any:
    dtype = dtype_of(node)
    epsilon = torch.finfo(node.meta["val"].dtype).eps if eps is None else eps
    if e.builder.opset >= 23:
        return e.op(
            "RMSNormalization",
            e.tensor(x, dtype),
            _gain(e, node, gain, shape),
            axis=-len(shape),
            epsilon=epsilon,
            dtype=dtype,
        )
    value = e.tensor(x, dtype)
    square = e.op("Mul", value, value)
    mean = e.op("ReduceMean", square, e.builder.ints(*range(-len(shape), 0)), keepdims=1)
    root = e.op("Sqrt", e.op("Add", mean, e.builder.constant(epsilon, dtype)))
    scaled = e.op("Div", value, root)
    return scaled if gain is None else e.op("Mul", scaled, e.value(gain))


def _batch_norm(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    gain: fx.Node | None,
    bias: fx.Node | None,
    mean: fx.Node,
    variance: fx.Node,
    *settings: Any,
) -> ir.Value:
    eps = settings[-1]
    shape = sizes_of(mean)
    shift = e.builder.constant([0] * int(shape[0]), dtype_of(x)) if bias is None else e.value(bias)
    return e.op(
        "BatchNormalization",
        e.value(x),
        _gain(e, x, gain, shape),
        shift,
        e.value(mean),
        e.value(variance),
        epsilon=eps,
    )


def _batch_norm_legit(e: Emitter, node: fx.Node, *args: Any) -> Any:
    """Translate the call that also returns the batch's statistics, empty when not training."""
    empty = e.builder.constant([], onnx_dtype(torch.float32))
    return _batch_norm(e, node, *args), empty, empty


def _batch_norm_plain(e: Emitter, node: fx.Node, *args: Any) -> Any:
    x, gain, bias, mean, variance, _training, _momentum, eps, _cudnn = args
    return _batch_norm(e, node, x, gain, bias, mean, variance, eps)


def _group_norm(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    groups: int,
    gain: fx.Node | None = None,
    bias: fx.Node | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Any:
    """Translate by an ``InstanceNormalization`` over ``[batch, groups, rest]``."""
    before, dtype = sizes_of(x), dtype_of(node)
    folded = (before[0], groups, -1)
    flat = e.op("Reshape", e.value(x), e.builder.ints(0, groups, -1))
    ones = e.builder.constant([1] * groups, dtype)
    zeros = e.builder.constant([0] * groups, dtype)
    normal = e.op("InstanceNormalization", flat, ones, zeros, epsilon=eps)
    result = e.reshape(normal, folded, before)
    wide = e.builder.ints(*range(1, len(before) - 1))
    if gain is not None:
        result = e.op("Mul", result, e.op("Unsqueeze", e.value(gain), wide))
    if bias is not None:
        result = e.op("Add", result, e.op("Unsqueeze", e.value(bias), wide))
    return result


def _softmax(e: Emitter, node: fx.Node, x: fx.Node, dim: int, *_: Any, **__: Any) -> Any:
    return e.op("Softmax", e.tensor(x, dtype_of(node)), axis=axis_of(x, dim))


def _log_softmax(e: Emitter, node: fx.Node, x: fx.Node, dim: int, *_: Any, **__: Any) -> Any:
    return e.op("LogSoftmax", e.tensor(x, dtype_of(node)), axis=axis_of(x, dim))


def reduction(kind: str) -> Handler:
    """Return the translation of a reduction over some axes (all of them, when none are given)."""

    def translate(
        e: Emitter, node: fx.Node, x: fx.Node, dim: Any = None, keepdim: bool = False, **_: Any
    ) -> Any:
        axes = None if dim in (None, []) else e.builder.ints(*_axes(x, dim))
        return e.op(kind, e.tensor(x, dtype_of(node)), axes, keepdims=int(keepdim))

    return translate


def _axes(x: fx.Node, dim: Any) -> list[int]:
    return [axis_of(x, d) for d in ([dim] if isinstance(dim, int) else dim)]


def _logical_reduction(kind: str) -> Handler:
    def translate(
        e: Emitter, node: fx.Node, x: fx.Node, dim: Any = None, keepdim: bool = False
    ) -> Any:
        truth = e.tensor(x, ir.DataType.BOOL)
        axes = None if dim is None else e.builder.ints(*_axes(x, dim))
        number = e.builder.cast(truth, ir.DataType.INT32)
        return e.builder.cast(e.op(kind, number, axes, keepdims=int(keepdim)), ir.DataType.BOOL)

    return translate


def _argument(kind: str) -> Handler:
    def translate(
        e: Emitter, node: fx.Node, x: fx.Node, dim: int | None = None, keepdim: bool = False
    ) -> Any:
        value = e.value(x)
        if dim is None:
            value = e.op("Reshape", value, e.builder.ints(-1))
        axis = 0 if dim is None else axis_of(x, dim)
        result = e.op(kind, value, axis=axis, keepdims=int(keepdim and dim is not None))
        result.dtype = ir.DataType.INT64
        return result

    return translate


def _extreme(reduce: str, argument: str) -> Handler:
    def translate(e: Emitter, node: fx.Node, x: fx.Node, dim: int, keepdim: bool = False) -> Any:
        axis, value = axis_of(x, dim), e.value(x)
        best = e.op(reduce, value, e.builder.ints(axis), keepdims=int(keepdim))
        return best, _argument(argument)(e, node, x, dim, keepdim)

    return translate


def _cumsum(e: Emitter, node: fx.Node, x: fx.Node, dim: int, **_: Any) -> Any:
    axis = e.builder.constant(axis_of(x, dim), ir.DataType.INT64)
    return e.op("CumSum", e.tensor(x, dtype_of(node)), axis)


def _variance(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    dim: Any = None,
    correction: int | None = 1,
    keepdim: bool = False,
) -> ir.Value:
    dtype = dtype_of(node)
    axes = list(range(rank_of(x))) if dim is None else _axes(x, dim)
    along = e.builder.ints(*axes)
    value = e.tensor(x, dtype)
    off = e.op("Sub", value, e.op("ReduceMean", value, along, keepdims=1))
    mean = e.op("ReduceMean", e.op("Mul", off, off), along, keepdims=int(keepdim))
    steps = 1 if correction is None else correction
    if not steps:
        return mean
    rows = [e.row(sizes_of(x)[axis]) for axis in axes]
    count = rows[0]
    for row in rows[1:]:
        count = e.op("Mul", count, row)
    scalar = e.op("Squeeze", count, e.builder.ints(0))
    less = e.op("Sub", scalar, e.builder.constant(steps, ir.DataType.INT64))
    ratio = e.op("Div", e.builder.cast(scalar, dtype), e.builder.cast(less, dtype))
    return e.op("Mul", mean, ratio)


def _deviation(e: Emitter, node: fx.Node, *args: Any, **options: Any) -> Any:
    return e.op("Sqrt", _variance(e, node, *args, **options))


def _topk(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    k: int,
    dim: int = -1,
    largest: bool = True,
    is_sorted: bool = True,
) -> Any:
    values, indices = e.builder.multi(
        "TopK",
        e.value(x),
        e.row(k),
        count=2,
        axis=axis_of(x, dim),
        largest=int(largest),
        sorted=int(is_sorted),
    )
    values.dtype, indices.dtype = dtype_of(x), ir.DataType.INT64
    return values, indices


def _sort(e: Emitter, node: fx.Node, x: fx.Node, dim: int = -1, descending: bool = False) -> Any:
    count = sizes_of(x)[axis_of(x, dim)]
    return _topk(e, node, x, count, dim, descending)  # type: ignore[arg-type]


HANDLERS: dict[Any, Handler] = {
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm_legit,
    aten.batch_norm.default: _batch_norm_plain,
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.log_softmax.int: _log_softmax,
    aten._log_softmax.default: _log_softmax,
    aten.mean.dim: reduction("ReduceMean"),
    aten.mean.default: reduction("ReduceMean"),
    aten.sum.dim_IntList: reduction("ReduceSum"),
    aten.sum.default: reduction("ReduceSum"),
    aten.amax.default: reduction("ReduceMax"),
    aten.amin.default: reduction("ReduceMin"),
    aten.max.default: reduction("ReduceMax"),
    aten.min.default: reduction("ReduceMin"),
    aten.prod.dim_int: reduction("ReduceProd"),
    aten.any.default: _logical_reduction("ReduceMax"),
    aten.any.dim: _logical_reduction("ReduceMax"),
    aten.all.default: _logical_reduction("ReduceMin"),
    aten.all.dim: _logical_reduction("ReduceMin"),
    aten.argmax.default: _argument("ArgMax"),
    aten.argmin.default: _argument("ArgMin"),
    aten.max.dim: _extreme("ReduceMax", "ArgMax"),
    aten.min.dim: _extreme("ReduceMin", "ArgMin"),
    aten.cumsum.default: _cumsum,
    aten.var.correction: _variance,
    aten.std.correction: _deviation,
    aten.topk.default: _topk,
    aten.sort.default: _sort,
}
