"""Translations of our quantised operators to ONNX Runtime's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from ...ir import LoweringError, Program, QuantizedEmbedding, QuantizedLinear
from ...ir import ops as _ops  # registers the operators
from ...ir.quant import QuantType
from ...ir.sparse import SparseLinear
from ...passes import Remark
from .builder import stored_dtype
from .emitter import Emitter, dtype_of, sizes_of
from .integers import multiplies_integers, product
from .pack import SMALLEST, Layout, layout

Handler = Callable[..., Any]
_UINT8 = ir.DataType.UINT8
_CONTRIB = "com.microsoft"

LINEAR = torch.ops.modelathe.quantized_linear.default
EMBEDDING = torch.ops.modelathe.quantized_embedding.default
SPARSE = torch.ops.modelathe.sparse_linear.default
assert _ops


def _linear(
    e: Emitter,
    node: fx.Node,
    x: fx.Node,
    codes: fx.Node,
    scales: fx.Node,
    zeros: fx.Node | None,
    bias: fx.Node | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Any:
    if multiplies_integers(x, bits, group_size, in_features):
        return product(e, node, x, codes, scales, zeros, bias)
    stored = layout(QuantType(bits, group_size, symmetric=zeros is None), in_features)
    rows = int(sizes_of(codes)[0])
    dtype = dtype_of(node)
    return e.op(
        "MatMulNBits",
        _activations(e, node, x, stored, dtype),
        _codes(e, codes, stored, as_blocks=True),
        _scales(e, scales, stored, dtype),
        None if zeros is None else _zeros(e, zeros, stored),
        None,
        None if bias is None else e.tensor(bias, dtype),
        domain=_CONTRIB,
        K=stored.width,
        N=rows,
        bits=stored.bits,
        block_size=stored.block,
        accuracy_level=e.accuracy_level,
    )


def _embedding(
    e: Emitter,
    node: fx.Node,
    ids: fx.Node,
    codes: fx.Node,
    scales: fx.Node,
    zeros: fx.Node | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Any:
    if _are_rows(codes, bits, group_size, in_features):
        return _rows(e, ids, codes, scales, zeros, bits, in_features)
    stored = layout(QuantType(bits, group_size, symmetric=zeros is None), in_features)
    result = e.op(
        "GatherBlockQuantized",
        _codes(e, codes, stored, as_blocks=False),
        e.value(ids),
        _scales(e, scales, stored, dtype_of(scales)),
        None if zeros is None else _zeros(e, zeros, stored),
        domain=_CONTRIB,
        dtype=dtype_of(scales),
        gather_axis=0,
        quantize_axis=1,
        block_size=stored.block,
        bits=stored.bits,
    )
    if stored.filled == stored.group:
        return result
    shape = sizes_of(node)
    if not stored.spread:
        return _cut(e, result, in_features)
    wide = (*shape[:-1], stored.groups, stored.filled)
    narrow = (*shape[:-1], stored.groups, stored.group)
    grouped = _cut(e, e.reshape(result, (*shape[:-1], stored.width), wide), stored.group)
    return e.reshape(grouped, narrow, shape)


def _sparse(e: Emitter, node: fx.Node, *_: Any) -> Any:
    """Refuse a product with single entries.

    Raises:
        LoweringError: always.
    """
    call = SparseLinear.match(node)
    assert call is not None
    raise LoweringError(
        f"%{node.name}: ONNX Runtime has no product with the single entries @{call.values.target}",
        remedy="keep whole columns, outlier-kind=structured; or write --to program",
    )


def _are_rows(codes: fx.Node, bits: int, group_size: int, in_features: int) -> bool:
    """Tell whether rows with one scale each are only looked up, and stored as they are.

    Where a linear reads the same codes they are stored as it needs them.
    """
    alike = codes.graph.find_nodes(op="get_attr", target=codes.target)
    multiplied = any(user.target is LINEAR for node in alike for user in node.users)
    return bits != 3 and group_size in (-1, in_features) and not multiplied


def _rows(
    e: Emitter,
    ids: fx.Node,
    codes: fx.Node,
    scales: fx.Node,
    zeros: fx.Node | None,
    bits: int,
    in_features: int,
) -> ir.Value:
    """Look up rows with one scale each: a block may be longer than what it holds."""
    return e.op(
        "GatherBlockQuantized",
        e.value(codes),
        e.value(ids),
        e.value(scales),
        None if zeros is None else e.value(zeros),
        domain=_CONTRIB,
        dtype=dtype_of(scales),
        gather_axis=0,
        quantize_axis=1,
        block_size=max(SMALLEST, 1 << (in_features - 1).bit_length()),
        bits=bits,
    )


def _cut(e: Emitter, value: ir.Value, width: int) -> ir.Value:
    ints = e.builder.ints
    return e.op("Slice", value, ints(0), ints(width), ints(-1))


def _activations(
    e: Emitter, node: fx.Node, x: fx.Node, stored: Layout, dtype: ir.DataType
) -> ir.Value:
    """Return the operand of a product, with zeros where groups were filled up."""
    value = e.tensor(x, dtype)
    if not stored.spread:
        return value
    shape = sizes_of(x)
    grouped = (*shape[:-1], stored.groups, stored.group)
    filled = (*shape[:-1], stored.groups, stored.filled)
    ints = e.builder.ints
    value = e.reshape(value, shape, grouped)
    fill = e.builder.constant(0, dtype)
    value = e.op("Pad", value, ints(0, stored.filled - stored.group), fill, ints(-1))
    return e.reshape(value, filled, (*shape[:-1], stored.width))


def _codes(e: Emitter, codes: fx.Node, stored: Layout, *, as_blocks: bool) -> ir.Value:
    """Return the codes, as ``[n, blocks, bytes]`` for products and ``[n, bytes]`` for look-ups.

    A weight that has readers of both kinds is stored in two dimensions, with a ``Reshape`` in front
    of the product: the other way round ONNX Runtime would keep a copy.
    """
    name = str(codes.target)
    rows = int(sizes_of(codes)[0])
    flat = (rows, stored.blocks * stored.bytes_per_block)
    cube = (rows, stored.blocks, stored.bytes_per_block)
    if as_blocks and name not in e.looked_up:
        return e.weights.derived(
            f"blocks {stored}", (name,), _UINT8, cube, lambda t: stored.codes(t).view(cube)
        )
    value = e.weights.derived(f"rows {stored}", (name,), _UINT8, flat, stored.codes)
    return e.op("Reshape", value, e.builder.ints(*cube)) if as_blocks else value


def _scales(e: Emitter, scales: fx.Node, stored: Layout, dtype: ir.DataType) -> ir.Value:
    """Return the scales, stored in the dtype that they have, as numbers of ``dtype``."""
    shape = (int(sizes_of(scales)[0]), stored.blocks)
    kept = stored_dtype(scales.meta["val"].dtype)
    name = str(scales.target)
    value = e.weights.derived(f"scales {stored}", (name,), kept, shape, stored.scales)
    return e.builder.cast(value, dtype)


def _zeros(e: Emitter, zeros: fx.Node, stored: Layout) -> ir.Value:
    shape = (int(sizes_of(zeros)[0]), stored.zeros_width)
    return e.weights.derived(f"zeros {stored}", (str(zeros.target),), _UINT8, shape, stored.zeros)


def widened(program: Program) -> Iterator[Remark]:
    """Yield remarks on weights that take more bits here than in the program."""
    types: dict[str, tuple[QuantType, int]] = {}
    for graph in program.graphs.values():
        for node in graph.nodes:
            if call := QuantizedLinear.match(node) or QuantizedEmbedding.match(node):
                qtype = QuantType(call.bits, call.group_size, symmetric=call.zeros is None)
                as_is = _are_rows(call.codes, call.bits, call.group_size, call.in_features)
                bits = call.bits if as_is else layout(qtype, call.in_features).bits
                types[str(call.codes.target)] = qtype, bits
    counts = Counter(pair for pair in types.values() if pair[1] != pair[0].bits)
    for (qtype, bits), count in counts.items():
        why = f"stored in {bits} bits: ONNX Runtime has no fast kernel for them"
        yield Remark("missed", f"{count} weights of {qtype}", why)


HANDLERS: dict[Any, Handler] = {LINEAR: _linear, EMBEDDING: _embedding, SPARSE: _sparse}
