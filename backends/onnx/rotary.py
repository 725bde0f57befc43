"""Translation of rotary position embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from .emitter import Emitter, dtype_of, sizes_of

Handler = Callable[..., Any]


def _rotary(
    e: Emitter, node: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node, interleaved: bool
) -> ir.Value:
    """Translate to one ``RotaryEmbedding`` node (opset 23), or to products and a sum.

    The node takes a fifth to a half of their time (ONNX Runtime 1.32, 128 tokens, one thread).
    There is none for float64.
    """
    value, dtype = e.tensor(x, dtype_of(node)), dtype_of(node)
    width, turned = int(sizes_of(x)[-1]), 2 * int(sizes_of(cos)[-1])
    if e.builder.opset < 23 or dtype == ir.DataType.DOUBLE:
        factors = _factors(e, cos, sin, interleaved, dtype)
        return _sum(e, value, factors, (turned, width - turned), interleaved)
    return e.op(
        "RotaryEmbedding",
        value,
        *(_for_all(e, angles, x, dtype) for angles in (cos, sin)),
        interleaved=1 if interleaved else None,
        rotary_embedding_dim=None if turned == width else turned,
    )


def _for_all(e: Emitter, angles: fx.Node, x: fx.Node, dtype: ir.DataType) -> ir.Value:
    """Return angles for every row of a batch: one for them all is too few for ONNX Runtime."""
    batch, _, tokens, _ = sizes_of(x)
    wanted = (batch, tokens, sizes_of(angles)[-1])
    key = ("rotary", angles, dtype, *map(e.sizes.text, wanted))
    if key not in e.memory:
        e.memory[key] = e.expand(e.tensor(angles, dtype), sizes_of(angles), wanted)
    return e.memory[key]


def _factors(
    e: Emitter, cos: fx.Node, sin: fx.Node, interleaved: bool, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value]:
    """Return what (x1, x2) and (x2, x1) are multiplied with: (cos, cos) and (-sin, sin)."""
    key = ("rotary factors", cos, sin, interleaved, dtype)
    if (*key, "cos") not in e.memory:
        straight, crossed = e.tensor(cos, dtype), e.tensor(sin, dtype)
        pairs = {"cos": (straight, straight), "sin": (e.op("Neg", crossed), crossed)}
        for name, pair in pairs.items():
            e.memory[*key, name] = _for_heads(e, pair, 2 * int(sizes_of(cos)[-1]), interleaved)
    return e.memory[*key, "cos"], e.memory[*key, "sin"]


def _for_heads(
    e: Emitter, pair: tuple[ir.Value, ir.Value], turned: int, interleaved: bool
) -> ir.Value:
    """Join ``[batch, tokens, turned / 2]`` to ``[batch, 1, tokens, turned]``."""
    axes = e.builder.ints(1, -1) if interleaved else e.builder.ints(1)
    joined = e.op("Concat", *(e.op("Unsqueeze", part, axes) for part in pair), axis=-1)
    return e.op("Reshape", joined, e.builder.ints(0, 0, 0, turned)) if interleaved else joined


def _sum(
    e: Emitter,
    value: ir.Value,
    factors: tuple[ir.Value, ir.Value],
    widths: tuple[int, int],
    interleaved: bool,
) -> ir.Value:
    """Return ``(x1, x2) * (cos, cos) + (x2, x1) * (-sin, sin)``, and the rest behind it."""
    turned, others = widths
    rest = None
    if others:
        value, rest = _split(e, value, e.builder.ints(turned, others))
    paired = e.op("Reshape", value, e.builder.ints(0, 0, 0, -1, 2)) if interleaved else value
    first, second = _split(e, paired, None)
    crossed = e.op("Concat", second, first, axis=-1)
    if interleaved:
        crossed = e.op("Reshape", crossed, e.builder.ints(0, 0, 0, turned))
    products = (e.op("Mul", x, factor) for x, factor in zip((value, crossed), factors, strict=True))
    result = e.op("Add", *products)
    return result if rest is None else e.op("Concat", result, rest, axis=-1)


def _split(e: Emitter, value: ir.Value, lengths: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """Cut the last axis in two, in halves unless lengths are given."""
    number = None if lengths else 2
    first, second = e.builder.multi("Split", value, lengths, count=2, axis=-1, num_outputs=number)
    first.dtype = second.dtype = value.dtype
    return first, second


HANDLERS: dict[Any, Handler] = {torch.ops.modelathe.rotary.default: _rotary}
