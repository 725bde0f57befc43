"""Translation of scaled dot-product attention, with its cache and its grouped heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from ...ir.errors import LoweringError
from .emitter import Emitter, dtype_of, rank_of, sizes_of
from .sizes import Size

aten = torch.ops.aten
Handler = Callable[..., Any]

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_COPIES = (aten.clone.default, aten.contiguous.default)


def _attention(
    e: Emitter,
    node: fx.Node,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    mask: fx.Node | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Translate attention to one ``Attention`` node (opset 23), or to products and a softmax.

    ONNX Runtime's node reads grouped heads as they are and joins the cache itself, so repeated
    heads are traced back to the ones that were repeated, and a join with a cached input becomes
    the node's own.  A query that may attend to nothing gives zeros, as in torch.
    """
    width = sizes_of(query)[-1]
    factor = 1 / math.sqrt(int(width)) if scale is None else float(scale)
    if e.builder.opset < 23 or rank_of(query) != 4:
        return _decomposed(e, node, query, key, value, mask, is_causal, factor)
    keys, values = _before_repeat(e, key), _before_repeat(e, value)
    heads = [e.sizes.text(sizes_of(x)[1]) for x in (keys, values)]
    if heads[0] != heads[1]:
        keys, values = key, value
    rows = None if mask is None else _mask(e, node, query, mask)
    past = None if is_causal else _cached(e, keys, values)
    if past is None:
        inputs = e.value(query), e.value(keys), e.value(values), rows
        causal = is_causal or None  # torch aligns to the first key, as ONNX does without a cache
        return e.op("Attention", *inputs, scale=factor, is_causal=causal)
    (old_key, new_key), (old_value, new_value) = past
    inputs = (e.value(query), e.value(new_key), e.value(new_value), rows)
    result, e.values[keys], e.values[values] = e.builder.multi(
        "Attention", *inputs, e.value(old_key), e.value(old_value), count=3, scale=factor
    )
    for made in (result, e.values[keys], e.values[values]):
        made.dtype = dtype_of(node)  # type: ignore[union-attr]
    return result


def _before_repeat(e: Emitter, node: fx.Node) -> fx.Node:
    """Return the grouped heads ``[b, groups, t, d]`` that ``node [b, heads, t, d]`` repeats.

    The repetition is ``unsqueeze(2)``, ``expand`` along it and ``view``, or ``repeat_interleave``;
    ``node`` itself when it is neither.
    """
    top = _source(e, node)
    if top.target is aten.repeat_interleave.self_int and top.args[2:3] in ((1,), (-3,)):
        return _source(e, top.args[0])
    if top.target not in _VIEWS:
        return top
    wide = _source(e, top.args[0])
    inner = _source(e, wide.args[0]) if wide.target is aten.expand.default else wide
    if inner.target is not aten.unsqueeze.default or inner.args[1] not in (2, -3):
        return top
    source = _source(e, inner.args[0])
    if rank_of(source) != 4:
        return top
    b, groups, t, d = (e.sizes.text(size) for size in sizes_of(source))
    expanded = [e.sizes.text(size) for size in sizes_of(wide)]
    repeats = expanded[2]
    viewed = [e.sizes.text(size) for size in sizes_of(top)]
    if not isinstance(groups, int) or not isinstance(repeats, int):
        return top
    same = expanded == [b, groups, repeats, t, d] and viewed == [b, groups * repeats, t, d]
    return source if same else top


def _source(e: Emitter, node: Any) -> fx.Node:
    """Return the node that holds the same numbers in the same sizes, behind calls that change none.

    They are copies, slices of everything, and joins with the empty row that a new cache begins as.
    """
    found: fx.Node = node
    while found.target in (*_COPIES, aten.slice.Tensor, aten.cat.default):
        parts: Any = found.args[0] if found.target is aten.cat.default else found.args[:1]
        whole = [part for part in parts if rank_of(part) == rank_of(found)]
        if len(whole) != 1 or dtype_of(whole[0]) != dtype_of(found):
            break
        pairs = zip(sizes_of(whole[0]), sizes_of(found), strict=True)
        if not all(e.same(before, after) for before, after in pairs):
            break
        found = whole[0]
    return found


_Join = tuple[fx.Node, fx.Node]


def _cached(e: Emitter, key: fx.Node, value: fx.Node) -> tuple[_Join, _Join] | None:
    """Return (cached, new) of keys and of values, where both join an input with new ones."""
    joins = [_join(e, node) for node in (key, value)]
    if joins[0] is None or joins[1] is None or key is value:
        return None
    if e.folded & {key, value}:
        return None
    e.folded |= {key, value}
    return joins[0], joins[1]


def _join(e: Emitter, node: fx.Node) -> _Join | None:
    if node.target is not aten.cat.default or rank_of(node) != 4:
        return None
    parts = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else 0
    if dim not in (2, -2) or not isinstance(parts, list | tuple) or len(parts) != 2:
        return None
    old, new = _source(e, parts[0]), _source(e, parts[1])
    if old.op != "placeholder":
        return None
    same = len({n.meta["val"].dtype for n in (old, new, node)}) == 1
    return (old, new) if same else None


def _mask(e: Emitter, node: fx.Node, query: fx.Node, mask: fx.Node) -> ir.Value:
    """Return a mask with a row for each query, which ONNX Runtime wants; made once, and shared."""
    sizes = sizes_of(mask)
    rows = sizes_of(query)[2]
    wanted = (*sizes[:-2], rows, sizes[-1])
    dtype = ir.DataType.BOOL if dtype_of(mask) == ir.DataType.BOOL else dtype_of(node)
    key = ("mask", mask, e.sizes.text(rows), dtype)
    if key not in e.memory:
        value = e.tensor(mask, dtype)
        if e.sizes.text(sizes[-2]) == 1 and e.sizes.text(rows) != 1:
            value = e.expand(value, sizes, wanted)
        e.memory[key] = value
    return e.memory[key]


def _decomposed(
    e: Emitter,
    node: fx.Node,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    mask: fx.Node | None,
    is_causal: bool,
    factor: float,
) -> ir.Value:
    """Return ``softmax(q k^T factor + mask) v``; what attends to nothing averages the values."""
    dtype = dtype_of(node)
    q, k, v = e.value(query), e.value(key), e.value(value)
    heads = [sizes_of(x)[1] for x in (query, key)] if rank_of(query) == 4 else [1, 1]
    if e.sizes.text(heads[0]) != e.sizes.text(heads[1]):
        k, v = (_repeated(e, x, query) for x in (key, value))
    order = [*range(rank_of(key) - 2), rank_of(key) - 1, rank_of(key) - 2]
    scaled = e.op("Mul", q, e.builder.constant(factor, dtype))
    scores = e.op("MatMul", scaled, e.op("Transpose", k, perm=order))
    bias = _causal_bias(e, query, key, dtype) if is_causal else None
    if mask is not None:
        bias = _bias(e, mask, dtype)
    if bias is not None:
        scores = e.op("Add", scores, bias)
    return e.op("MatMul", e.op("Softmax", scores, axis=-1), v)


def _repeated(e: Emitter, x: fx.Node, query: fx.Node) -> ir.Value:
    b, groups, t, d = sizes_of(x)
    heads = sizes_of(query)[1]
    if not isinstance(heads, int) or not isinstance(groups, int):
        raise LoweringError(f"%{x.name}: attention over a symbolic number of heads")
    wide: tuple[Size, ...] = (b, groups, heads // groups, t, d)
    value = e.op("Unsqueeze", e.value(x), e.builder.ints(2))
    value = e.expand(value, (b, groups, 1, t, d), wide)
    return e.reshape(value, wide, (b, heads, t, d))


def _bias(e: Emitter, mask: fx.Node, dtype: ir.DataType) -> ir.Value:
    """Return a mask as numbers to add; made once, and shared by all blocks."""
    if dtype_of(mask) != ir.DataType.BOOL:
        return e.tensor(mask, dtype)
    key = ("bias", mask, dtype)
    if key not in e.memory:
        numbers = (e.builder.constant(number, dtype) for number in (0.0, _lowest(dtype)))
        e.memory[key] = e.op("Where", e.value(mask), *numbers, dtype=dtype)
    return e.memory[key]


def _causal_bias(e: Emitter, query: fx.Node, key: fx.Node, dtype: ir.DataType) -> ir.Value:
    shape = (sizes_of(query)[-2], sizes_of(key)[-2])
    memory = ("causal", *(e.sizes.text(size) for size in shape), dtype)
    if memory not in e.memory:
        lowest = e.builder.constant(_lowest(dtype), dtype)
        full = e.op("Expand", lowest, e.shape(shape))
        one = e.builder.constant(1, ir.DataType.INT64)
        e.memory[memory] = e.op("Trilu", full, one, upper=1)
    return e.memory[memory]


def _lowest(dtype: ir.DataType) -> float:
    """Return the lowest finite number; -inf would make not-a-number of a row that is all masked."""
    half = dtype == ir.DataType.FLOAT16
    return float(torch.finfo(torch.float16 if half else torch.float32).min)


HANDLERS: dict[Any, Handler] = {aten.scaled_dot_product_attention.default: _attention}
