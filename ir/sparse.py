"""Products with a weight of few entries: the operator, and its call beside a quantised linear.

A weight ``H: [out, in]`` that is zero but for a few entries is stored row by row (CSR): the values
of its entries, the columns that they are in, and how many each row has.  Columns and counts are of
the narrowest type that holds a row's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx

from .activations import RoundedActivations
from .calls import Linear, QuantizedLinear, argument
from .quant import row_tiles, wider

_LINEAR = "modelathe::sparse_linear"
_INDICES = (torch.uint8, torch.int16, torch.int32)


def index_dtype(width: int) -> torch.dtype:
    """The narrowest type for columns and counts of rows of ``width`` numbers.

    >>> index_dtype(255), index_dtype(4096), index_dtype(1 << 15)
    (torch.uint8, torch.int16, torch.int32)
    """
    return next(dtype for dtype in _INDICES if width <= torch.iinfo(dtype).max)


def flat_places(columns: Tensor, counts: Tensor, width: int) -> Tensor:
    """The places ``row * width + column`` of entries, ascending: int64 [count]."""
    begins = torch.arange(0, len(counts) * width, width, device=counts.device)
    # the size is given: it does not depend on what the counts are
    return begins.repeat_interleave(counts.long(), output_size=len(columns)) + columns


def add_entries(part: Tensor, rows: slice, values: Tensor, places: Tensor) -> None:
    """Add the entries that lie in some rows of a sparse weight to ``part [rows, in]``, in place.

    Args:
        part: contiguous.
        rows: which rows of the weight ``part`` holds.
        values: [count], of all rows.
        places: [count], as ``flat_places`` returns them.
    """
    entries, own = _within(places, rows, part.shape[1])
    part.view(-1)[own] += values[entries].to(part.dtype)


def _within(places: Tensor, rows: slice, width: int) -> tuple[slice, Tensor]:
    """Return which entries lie in some rows, and their places counted from the first of them."""
    ends = torch.tensor([rows.start * width, rows.stop * width], device=places.device)
    start, stop = torch.searchsorted(places, ends).tolist()
    return slice(start, stop), places[start:stop] - rows.start * width


def sparse_linear(x: Tensor, values: Tensor, columns: Tensor, counts: Tensor) -> Tensor:
    """``y[..., out] = x[..., in] @ H.T``; H is filled in, a run of rows at a time."""
    out, width = len(counts), x.shape[-1]
    places = flat_places(columns, counts, width)
    result = x.new_empty((*x.shape[:-1], out))
    for rows in row_tiles(out, width):
        part = x.new_zeros(rows.stop - rows.start, width)
        add_entries(part, rows, values, places)
        result[..., rows] = torch.nn.functional.linear(x, part)
    return result


def _shape(x: Tensor, values: Tensor, columns: Tensor, counts: Tensor) -> Tensor:
    if not x.is_floating_point() or not values.is_floating_point():
        raise RuntimeError(f"x and values are {x.dtype} and {values.dtype}, not floating-point")
    if columns.dtype not in _INDICES or counts.dtype not in _INDICES:
        kinds = f"{columns.dtype} and {counts.dtype}"
        raise RuntimeError(f"columns and counts are {kinds}, not uint8, int16 or int32")
    if values.dim() != 1 or values.shape != columns.shape or counts.dim() != 1:
        shapes = f"{list(values.shape)}, {list(columns.shape)} and {list(counts.shape)}"
        raise RuntimeError(f"values, columns and counts {shapes} do not fit")
    return x.new_empty((*x.shape[:-1], counts.shape[0]))


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """``dx = g H``, and ``dH = g.T x`` at the places of the entries."""
    x, values, columns, counts = ctx.saved_tensors
    width, out = x.shape[-1], grad.shape[-1]
    places = flat_places(columns, counts, width)
    flat, wide = grad.reshape(-1, out), wider(grad.dtype)
    x_grad = torch.zeros(x.shape, dtype=wide, device=x.device)
    values_grad = torch.zeros(values.shape, dtype=wide, device=x.device)
    for rows in row_tiles(out, width):
        if ctx.needs_input_grad[0]:
            part = grad.new_zeros(rows.stop - rows.start, width)
            add_entries(part, rows, values, places)
            x_grad += (flat[:, rows] @ part).view(x.shape)
        if ctx.needs_input_grad[1]:
            entries, own = _within(places, rows, width)
            product = flat[:, rows].T.to(wide) @ x.reshape(-1, width).to(wide)
            values_grad[entries] = product.flatten()[own]
    return x_grad.to(x.dtype), values_grad.to(values.dtype), None, None


torch.library.define(_LINEAR, "(Tensor x, Tensor values, Tensor columns, Tensor counts) -> Tensor")
torch.library.impl(_LINEAR, "CompositeExplicitAutograd", sparse_linear)
torch.library.register_fake(_LINEAR, _shape)
torch.library.register_autograd(_LINEAR, _backward, setup_context=_context)


@dataclass(frozen=True, slots=True)
class SparseLinear:
    """A product with a weight of few entries; see ``sparse_linear``."""

    node: fx.Node
    input: fx.Node
    values: fx.Node
    columns: fx.Node
    counts: fx.Node

    @classmethod
    def match(cls, node: fx.Node) -> Self | None:
        """Return the view, or None when ``node`` is another call."""
        if node.target is not torch.ops.modelathe.sparse_linear.default:
            return None
        return cls(node, *(argument(node, i, name) for i, name in enumerate(_PARTS)))


_PARTS = ("x", "values", "columns", "counts")


@dataclass(frozen=True, slots=True)
class OutlierSum:
    """A quantised linear, and the product with what of its weight is kept beside the codes.

    Structured: ``quantized_linear(x, ...) + linear(index_select(x, -1, columns), values)``;
    unstructured: ``quantized_linear(x, ...) + sparse_linear(x, values, columns, counts)``.
    The quantised linear alone may read x rounded (``round_activations``).

    Attributes:
        node: the sum.
        product: the quantised linear.
        beside: the other product.
        values: what is kept.
        columns: where.
        counts: entries of each row; None: whole columns.
    """

    node: fx.Node
    product: QuantizedLinear
    beside: fx.Node
    values: fx.Node
    columns: fx.Node
    counts: fx.Node | None

    @property
    def parts(self) -> tuple[fx.Node, ...]:
        """The weights of what is kept."""
        known = (self.values, self.columns, self.counts)
        return tuple(part for part in known if part is not None)

    @classmethod
    def match(cls, node: fx.Node) -> Self | None:
        """Return the view, or None when ``node`` is another call."""
        if node.target is not torch.ops.aten.add.Tensor or len(node.all_input_nodes) != 2:
            return None
        first, beside = node.all_input_nodes
        product = QuantizedLinear.match(first)
        if product is None:
            return None
        if sparse := SparseLinear.match(beside):
            source, counts = sparse.input, sparse.counts
            found = cls(node, product, beside, sparse.values, sparse.columns, counts)
        elif (thin := Linear.match(beside)) and thin.bias is None and _is_gather(thin.input):
            source, columns = (argument(thin.input, i, n) for i, n in ((0, "self"), (2, "index")))
            found = cls(node, product, beside, thin.weight, columns, None)
        else:
            return None
        stored = all(part.op == "get_attr" for part in found.parts)
        return found if stored and source in (product.input, _unrounded(product.input)) else None


def _unrounded(node: fx.Node) -> fx.Node:
    """Return what is rounded, where a call rounds activations."""
    view = RoundedActivations.match(node)
    return node if view is None else view.input


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
