"""Translations of calls that move, cut, join and make tensors without computing on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from .elementwise import full
from .emitter import Emitter, Operand, Whole, axis_of, dtype_of, is_size, rank_of, sizes_of

aten = torch.ops.aten
Handler = Callable[..., Any]
_INT64 = ir.DataType.INT64
_END = torch.iinfo(torch.int64).max


def _view(e: Emitter, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> Any:
    before, after = sizes_of(x), sizes_of(node)
    if [e.sizes.text(s) for s in before] == [e.sizes.text(s) for s in after]:
        return e.value(x)
    return e.reshape(e.value(x), before, after)


def _unsqueeze(e: Emitter, node: fx.Node, x: fx.Node, dim: int) -> Any:
    return e.op("Unsqueeze", e.value(x), e.builder.ints(dim % rank_of(node)))


def _squeeze(e: Emitter, node: fx.Node, x: fx.Node, dim: Any = None) -> Any:
    dims = [dim] if isinstance(dim, int) else dim
    axes = {axis_of(x, d) for d in (range(rank_of(x)) if dims is None else dims)}
    ones = [axis for axis in sorted(axes) if e.sizes.text(sizes_of(x)[axis]) == 1]
    return e.op("Squeeze", e.value(x), e.builder.ints(*ones)) if ones else e.value(x)


def _permute(e: Emitter, node: fx.Node, x: fx.Node, dims: Sequence[int]) -> Any:
    order = [axis_of(x, dim) for dim in dims]
    return e.value(x) if order == sorted(order) else e.op("Transpose", e.value(x), perm=order)


def _transpose(e: Emitter, node: fx.Node, x: fx.Node, first: int, second: int) -> Any:
    order = list(range(rank_of(x)))
    a, b = axis_of(x, first), axis_of(x, second)
    order[a], order[b] = order[b], order[a]
    return _permute(e, node, x, order)


def _turn(e: Emitter, node: fx.Node, x: fx.Node) -> Any:
    return _permute(e, node, x, list(range(rank_of(x)))[::-1])


def _expand(e: Emitter, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> Any:
    return e.expand(e.value(x), sizes_of(x), sizes_of(node))


def _slice(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    dim: int = 0,
    start: Whole | None = None,
    end: Whole | None = None,
    step: int = 1,
) -> Any:
    first = 0 if start is None else start
    last = _END if end is None else end
    axis = axis_of(x, dim)
    whole = e.sizes.text(sizes_of(x)[axis])
    if first == 0 and step == 1 and (last == _END or e.sizes.text(e.size(last)) == whole):
        return e.value(x)
    return e.op(
        "Slice",
        e.value(x),
        e.row(first),
        e.row(last),
        e.builder.ints(axis),
        None if step == 1 else e.builder.ints(step),
    )


def _select(e: Emitter, node: fx.Node, x: fx.Node, dim: int, index: Whole) -> Any:
    return e.op("Gather", e.value(x), e.scalar(index), axis=axis_of(x, dim))


def _narrow(e: Emitter, node: fx.Node, x: fx.Node, dim: int, start: Whole, length: Whole) -> Any:
    first = e.row(start)
    last = e.op("Add", first, e.row(length))
    return e.op("Slice", e.value(x), first, last, e.builder.ints(axis_of(x, dim)))


def _cat(e: Emitter, node: fx.Node, tensors: Sequence[fx.Node], dim: int = 0) -> Any:
    dtype = dtype_of(node)
    # torch skips old-style empty operands of one axis, whatever the others look like
    kept = [t for t in tensors if rank_of(t) == rank_of(node)]
    values = [e.tensor(t, dtype) for t in kept]
    return values[0] if len(values) == 1 else e.op("Concat", *values, axis=axis_of(node, dim))


def _stack(e: Emitter, node: fx.Node, tensors: Sequence[fx.Node], dim: int = 0) -> Any:
    dtype, axis = dtype_of(node), axis_of(node, dim)
    rows = [e.op("Unsqueeze", e.tensor(t, dtype), e.builder.ints(axis)) for t in tensors]
    return e.op("Concat", *rows, axis=axis)


def _split(e: Emitter, node: fx.Node, x: fx.Node, _how: Any, dim: int = 0) -> Any:
    """Translate every kind of split: the results' sizes say all but the axis."""
    axis = axis_of(x, dim)
    parts = [part.shape[axis] for part in node.meta["val"]]
    if len(parts) == 1:
        return (e.value(x),)
    lengths = e.shape(parts)
    return e.builder.multi("Split", e.value(x), lengths, count=len(parts), axis=axis)


def _unbind(e: Emitter, node: fx.Node, x: fx.Node, dim: int = 0) -> Any:
    axis = axis_of(x, dim)
    count = len(node.meta["val"])
    parts = e.builder.multi("Split", e.value(x), count=count, axis=axis, num_outputs=count)
    return tuple(e.op("Squeeze", part, e.builder.ints(axis)) for part in parts)


def _repeat(e: Emitter, node: fx.Node, x: fx.Node, repeats: Sequence[Whole]) -> Any:
    value, before = e.value(x), sizes_of(x)
    extra = len(repeats) - len(before)
    if extra:
        value = e.reshape(value, before, (*([1] * extra), *before))
    return e.op("Tile", value, e.shape([e.size(count) for count in repeats]))


def _repeat_interleave(
    e: Emitter, node: fx.Node, x: fx.Node, repeats: int, dim: int | None = None, **_: Any
) -> Any:
    before = sizes_of(x)
    if dim is None or not isinstance(repeats, int):
        return NotImplemented
    axis = axis_of(x, dim)
    inner = (*before[: axis + 1], 1, *before[axis + 1 :])
    wide = (*before[: axis + 1], repeats, *before[axis + 1 :])
    value = e.op("Unsqueeze", e.value(x), e.builder.ints(axis + 1))
    return e.reshape(e.expand(value, inner, wide), wide, sizes_of(node))


def _flip(e: Emitter, node: fx.Node, x: fx.Node, dims: Sequence[int]) -> Any:
    axes = e.builder.ints(*(axis_of(x, dim) for dim in dims))
    ends = e.builder.ints(*([-_END] * len(dims)))
    back = e.builder.ints(*([-1] * len(dims)))
    return e.op("Slice", e.value(x), back, ends, axes, back)


def _roll(
    e: Emitter, node: fx.Node, x: fx.Node, shifts: Sequence[int], dims: Sequence[int] = ()
) -> Any:
    if not dims:
        return NotImplemented
    value = e.value(x)
    for shift, dim in zip(shifts, dims, strict=True):
        axis = e.builder.ints(axis_of(x, dim))
        cut = e.builder.ints(-shift)
        head = e.op("Slice", value, e.builder.ints(0), cut, axis)
        tail = e.op("Slice", value, cut, e.builder.ints(_END), axis)
        value = e.op("Concat", tail, head, axis=axis_of(x, dim))
    return value


def _pad(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    pad: Sequence[Whole],
    mode: str | float = "constant",
    value: float | None = None,
) -> Any:
    if not isinstance(mode, str):  # constant_pad_nd has no mode
        return _pad(e, node, x, pad, "constant", mode)
    onnx_mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}[mode]
    pairs = [pad[i : i + 2] for i in range(0, len(pad), 2)][::-1]
    sizes = [e.size(p[0]) for p in pairs] + [e.size(p[1]) for p in pairs]
    axes = range(rank_of(x) - len(pairs), rank_of(x))
    fill = e.builder.constant(value or 0, dtype_of(node)) if mode == "constant" else None
    return e.op("Pad", e.value(x), e.shape(sizes), fill, e.builder.ints(*axes), mode=onnx_mode)


def _arange(e: Emitter, node: fx.Node, *bounds: Operand, **_: Any) -> Any:
    steps = {1: (0, *bounds, 1), 2: (*bounds, 1), 3: bounds}[len(bounds)]
    dtype = dtype_of(node)
    whole = [b for b in steps if isinstance(b, int) or (isinstance(b, fx.Node) and is_size(b))]
    if len(whole) == 3:
        return e.builder.cast(e.op("Range", *(e.scalar(b) for b in whole)), dtype)
    return e.op("Range", *(e.tensor(b, dtype) for b in steps))


def _tri(upper: int) -> Handler:
    def translate(e: Emitter, node: fx.Node, x: fx.Node, diagonal: int = 0) -> Any:
        return e.op("Trilu", e.value(x), e.builder.constant(diagonal, _INT64), upper=upper)

    return translate


def _gather(e: Emitter, node: fx.Node, x: fx.Node, dim: int, index: fx.Node, **_: Any) -> Any:
    return e.op("GatherElements", e.value(x), e.value(index), axis=axis_of(x, dim))


def _index_select(e: Emitter, node: fx.Node, x: fx.Node, dim: int, index: fx.Node) -> Any:
    return e.op("Gather", e.value(x), e.value(index), axis=axis_of(x, dim))


def _scatter(reduction: str | None = None) -> Handler:
    def translate(
        e: Emitter, node: fx.Node, x: fx.Node, dim: int, index: fx.Node, source: Operand, **_: Any
    ) -> Any:
        dtype = dtype_of(node)
        values = e.tensor(source, dtype)
        if not isinstance(source, fx.Node):
            values = e.op("Expand", values, e.op("Shape", e.value(index), dtype=_INT64))
        return e.op(
            "ScatterElements",
            e.value(x),
            e.value(index),
            values,
            axis=axis_of(x, dim),
            reduction=reduction,
        )

    return translate


def _index(e: Emitter, node: fx.Node, x: fx.Node, indices: Sequence[fx.Node | None]) -> Any:
    """Translate ``x[i, :, j]``: indexed axes go to the front, and back if they are adjacent."""
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    given = [index for index in indices if index is not None]
    if any(index.meta["val"].dtype == torch.bool for index in given):
        return NotImplemented
    if len(given) == 1:
        return e.op("Gather", e.value(x), e.value(given[0]), axis=axes[0])
    rest = [axis for axis in range(rank_of(x)) if axis not in axes]
    value = e.value(x)
    if axes != list(range(len(axes))):
        value = e.op("Transpose", value, perm=axes + rest)
    common = tuple(torch.broadcast_shapes(*map(sizes_of, given)))  # type: ignore[no-untyped-call]
    whole = e.shape(common)
    rows = [
        e.op("Unsqueeze", e.op("Expand", e.tensor(index, _INT64), whole), e.builder.ints(-1))
        for index in given
    ]
    picked = e.op("GatherND", value, e.op("Concat", *rows, axis=-1))
    front = len(common)
    adjacent = axes == list(range(axes[0], axes[0] + len(axes)))
    if not adjacent or axes[0] == 0:
        return picked
    lead = list(range(front, front + axes[0]))
    order = [*lead, *range(front), *range(front + axes[0], front + len(rest))]
    return e.op("Transpose", picked, perm=order)


def _select_scatter(
    e: Emitter, node: fx.Node, x: fx.Node, source: fx.Node, dim: int, index: int
) -> Any:
    axis = axis_of(x, dim)
    row = e.op("Unsqueeze", e.tensor(source, dtype_of(node)), e.builder.ints(axis))
    return _replace(e, node, x, row, axis, index, index + 1 if index != -1 else _END)


def _slice_scatter(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    source: fx.Node,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    if step != 1:
        return NotImplemented
    last = _END if end is None else end
    values = e.tensor(source, dtype_of(node))
    return _replace(e, node, x, values, axis_of(x, dim), start or 0, last)


def _replace(
    e: Emitter, node: fx.Node, x: fx.Node, middle: ir.Value, axis: int, start: Any, end: Any
) -> ir.Value:
    """Return ``x`` with ``[start, end)`` along ``axis`` replaced, by cutting and joining."""
    value, along = e.value(x), e.builder.ints(axis)
    parts = [middle]
    if start != 0:
        parts.insert(0, e.op("Slice", value, e.builder.ints(0), e.row(start), along))
    whole = e.sizes.text(sizes_of(x)[axis])
    if end != _END and end != whole:
        parts.append(e.op("Slice", value, e.row(end), e.builder.ints(_END), along))
    return parts[0] if len(parts) == 1 else e.op("Concat", *parts, axis=axis)


def _copy(e: Emitter, node: fx.Node, x: fx.Node, source: fx.Node, *_: Any) -> Any:
    return e.expand(e.tensor(source, dtype_of(node)), sizes_of(source), sizes_of(node))


def _meshgrid(e: Emitter, node: fx.Node, tensors: Sequence[fx.Node], indexing: str = "ij") -> Any:
    if indexing != "ij":
        return NotImplemented
    whole = e.shape(list(node.meta["val"][0].shape))
    results = []
    for axis, tensor in enumerate(tensors):
        others = [i for i in range(len(tensors)) if i != axis]
        wide = e.op("Unsqueeze", e.value(tensor), e.builder.ints(*others))
        results.append(e.op("Expand", wide, whole))
    return tuple(results)


def _one_hot(e: Emitter, node: fx.Node, x: fx.Node, classes: int = -1) -> Any:
    if classes < 0:
        return NotImplemented
    values = e.builder.ints(0, 1)
    return e.op("OneHot", e.value(x), e.builder.ints(classes), values, axis=-1)


def _zeros_of(e: Emitter, node: fx.Node, x: fx.Node, *_: Any, **__: Any) -> Any:
    return full(e, node, 0)


HANDLERS: dict[Any, Handler] = {
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.flatten.using_ints: _view,
    aten.unflatten.int: _view,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _turn,
    aten.numpy_T.default: _turn,
    aten.expand.default: _expand,
    aten.expand_as.default: _expand,
    aten.broadcast_to.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.narrow.default: _narrow,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.split.Tensor: _split,
    aten.split.sizes: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.unbind.int: _unbind,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.flip.default: _flip,
    aten.roll.default: _roll,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.tril.default: _tri(0),
    aten.triu.default: _tri(1),
    aten.gather.default: _gather,
    aten.index_select.default: _index_select,
    aten.scatter.src: _scatter(),
    aten.scatter.value: _scatter(),
    aten.scatter_add.default: _scatter("add"),
    aten.index.Tensor: _index,
    aten.select_scatter.default: _select_scatter,
    aten.slice_scatter.default: _slice_scatter,
    aten.copy.default: _copy,
    aten.meshgrid.indexing: _meshgrid,
    aten.one_hot.default: _one_hot,
}
