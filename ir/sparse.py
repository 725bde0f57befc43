"""Products with a weight of few entries: the operator, and its call beside a quantised linear.

A weight ``H: [out, in]`` that is zero but for a few entries is stored as their values and their
flat places, ``row * in + column``, in ascending order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx

from .calls import Linear, QuantizedLinear, argument
from .quant import row_tiles, wider

_LINEAR = "modelathe::sparse_linear"


def add_entries(part: Tensor, rows: slice, values: Tensor, indices: Tensor) -> None:
    """Add the entries that lie in some rows of a sparse weight to ``part [rows, in]``, in place.

    Args:
        part: contiguous.
        rows: which rows of the weight ``part`` holds.
        values: [count], of all rows.
        indices: [count], flat places in the whole weight, ascending.
    """
    entries, places = _within(indices, rows, part.shape[1])
    part.view(-1)[places] += values[entries].to(part.dtype)


def _within(indices: Tensor, rows: slice, width: int) -> tuple[slice, Tensor]:
    """Return which entries lie in some rows, and their places counted from the first of them."""
    ends = torch.tensor([rows.start * width, rows.stop * width], device=indices.device)
    start, stop = torch.searchsorted(indices.long(), ends).tolist()
    return slice(start, stop), indices[start:stop].long() - rows.start * width


def sparse_linear(x: Tensor, values: Tensor, indices: Tensor, out_features: int) -> Tensor:
    """``y[..., out] = x[..., in] @ H.T``; H is filled in, a run of rows at a time."""
    width = x.shape[-1]
    result = x.new_empty((*x.shape[:-1], out_features))
    for rows in row_tiles(out_features, width):
        part = x.new_zeros(rows.stop - rows.start, width)
        add_entries(part, rows, values, indices)
        result[..., rows] = torch.nn.functional.linear(x, part)
    return result


def _shape(x: Tensor, values: Tensor, indices: Tensor, out_features: int) -> Tensor:
    if not x.is_floating_point() or not values.is_floating_point():
        raise RuntimeError(f"x and values are {x.dtype} and {values.dtype}, not floating-point")
    if indices.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(f"indices are {indices.dtype}, not int32 or int64")
    if values.dim() != 1 or values.shape != indices.shape:
        raise RuntimeError(f"{list(values.shape)} values do not fit {list(indices.shape)} indices")
    return x.new_empty((*x.shape[:-1], out_features))


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, _ = inputs
    ctx.save_for_backward(x, values, indices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """``dx = g H``, and ``dH = g.T x`` at the places of the entries."""
    x, values, indices = ctx.saved_tensors
    width, out = x.shape[-1], grad.shape[-1]
    flat, wide = grad.reshape(-1, out), wider(grad.dtype)
    x_grad = torch.zeros(x.shape, dtype=wide, device=x.device)
    values_grad = torch.zeros(values.shape, dtype=wide, device=x.device)
    for rows in row_tiles(out, width):
        if ctx.needs_input_grad[0]:
            part = grad.new_zeros(rows.stop - rows.start, width)
            add_entries(part, rows, values, indices)
            x_grad += (flat[:, rows] @ part).view(x.shape)
        if ctx.needs_input_grad[1]:
            entries, places = _within(indices, rows, width)
            product = flat[:, rows].T.to(wide) @ x.reshape(-1, width).to(wide)
            values_grad[entries] = product.flatten()[places]
    return x_grad.to(x.dtype), values_grad.to(values.dtype), None, None


torch.library.define(
    _LINEAR, "(Tensor x, Tensor values, Tensor indices, int out_features) -> Tensor"
)
torch.library.impl(_LINEAR, "CompositeExplicitAutograd", sparse_linear)
torch.library.register_fake(_LINEAR, _shape)
torch.library.register_autograd(_LINEAR, _backward, setup_context=_context)


@dataclass(frozen=True, slots=True)
class SparseLinear:
    """A product with a weight of few entries; see ``sparse_linear``."""

    node: fx.Node
    input: fx.Node
    values: fx.Node
    indices: fx.Node

    @classmethod
    def match(cls, node: fx.Node) -> Self | None:
        """Return the view, or None when ``node`` is another call."""
        if node.target is not torch.ops.modelathe.sparse_linear.default:
            return None
        return cls(node, *(argument(node, i, name) for i, name in enumerate(_PARTS)))


_PARTS = ("x", "values", "indices")


@dataclass(frozen=True, slots=True)
class OutlierSum:
    """A quantised linear, and the product with what of its weight is kept beside the codes.

    Structured: ``quantized_linear(x, ...) + linear(index_select(x, -1, indices), values)``;
    unstructured: ``quantized_linear(x, ...) + sparse_linear(x, values, indices, out)``.
    """

    node: fx.Node
    product: QuantizedLinear
    beside: fx.Node
    values: fx.Node
    indices: fx.Node
    structured: bool

    @classmethod
    def match(cls, node: fx.Node) -> Self | None:
        """Return the view, or None when ``node`` is another call."""
        if node.target is not torch.ops.aten.add.Tensor or len(node.all_input_nodes) != 2:
            return None
        first, beside = node.all_input_nodes
        product = QuantizedLinear.match(first)
        if product is None:
            return None
        parts: tuple[fx.Node, ...]
        if sparse := SparseLinear.match(beside):
            parts = (sparse.input, sparse.values, sparse.indices)
        elif (thin := Linear.match(beside)) and thin.bias is None and _is_gather(thin.input):
            gather = thin.input
            parts = (argument(gather, 0, "self"), thin.weight, argument(gather, 2, "index"))
        else:
            return None
        source, values, indices = parts
        if source is not product.input or values.op != "get_attr" or indices.op != "get_attr":
            return None
        return cls(node, product, beside, values, indices, structured=sparse is None)


def _is_gather(node: fx.Node) -> bool:
    """Whether a call picks columns by a weight: ``index_select(x, -1, @indices)``."""
    return node.target is torch.ops.aten.index_select.default and argument(node, 1, "dim") == -1


def outlier_sums(graph: fx.Graph) -> tuple[OutlierSum, ...]:
    """Return the sums of a graph, in order."""
    nodes = graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    return tuple(view for node in nodes if (view := OutlierSum.match(node)) is not None)


def is_beside(node: fx.Node) -> bool:
    """Tell whether a call is the product with what is kept beside codes."""
    sums = map(OutlierSum.match, node.users)
    return any(one is not None and one.beside is node for one in sums)
