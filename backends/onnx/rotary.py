"""Rotary position embeddings, found in the sums that models write for them.

With the last axis of x in pairs (x1, x2), which are its halves or its neighbours, and the same
angle for both of a pair, ``x cos + (-x2, x1) sin`` is one ``RotaryEmbedding`` node (opset 23),
which runs 3 to 4 times faster than its parts.
"""

from __future__ import annotations

from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import fx

from .emitter import Emitter, dtype_of, rank_of, sizes_of

aten = torch.ops.aten

Pairing = Literal["halves", "neighbours"]
_WIDENED = (aten.unsqueeze.default, aten.repeat_interleave.self_int)
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)

# Calls that work number by number, and so keep equal what is equal.
_PER_NUMBER = (
    aten.cos.default,
    aten.sin.default,
    aten._to_copy.default,
    aten.clone.default,
    aten.mul.Tensor,  # by a single number
)


def rotary(e: Emitter, node: fx.Node, x: Any, y: Any) -> ir.Value | None:
    """Return the sum ``x + y`` as one node, or None when it is not a rotary embedding."""
    if e.builder.opset < 23 or not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
        return None
    if {x.target, y.target} != {aten.mul.Tensor} or rank_of(node) != 4:
        return None
    (vector, cosine), (turned, sine) = x.args, y.args
    if not isinstance(vector, fx.Node) or not isinstance(turned, fx.Node) or rank_of(vector) != 4:
        return None
    pairing = _pairing(turned, vector)
    if pairing is None:
        return None
    halves = [_half(e, angles, vector, pairing) for angles in (cosine, sine)]
    if halves[0] is None or halves[1] is None:
        return None
    return e.op(
        "RotaryEmbedding",
        e.tensor(vector, dtype_of(node)),
        *halves,
        interleaved=1 if pairing == "neighbours" else None,
    )


def _pairing(turned: fx.Node, x: fx.Node) -> Pairing | None:
    """Return how ``turned`` pairs the numbers of ``x``, if it is ``(-x2, x1)``."""
    width = sizes_of(x)[-1]
    if not isinstance(width, int) or width % 2:
        return None
    if turned.target is aten.cat.default and _parts(turned, 3) is not None:
        first, second = (0, width // 2, 1), (width // 2, width, 1)
        return "halves" if _cuts(_parts(turned, 3), x) == (second, first) else None
    stack = turned.args[0]
    if turned.target not in _VIEWS or not isinstance(stack, fx.Node):
        return None
    if stack.target is aten.stack.default and sizes_of(turned) == sizes_of(x):
        even, odd = (0, width, 2), (1, width, 2)
        return "neighbours" if _cuts(_parts(stack, 4), x) == (odd, even) else None
    return None


def _parts(node: fx.Node, last: int) -> list[Any] | None:
    """Return the two things that a call joins along its last axis, the first without its minus."""
    things, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    if dim not in (-1, last) or not isinstance(things, list | tuple) or len(things) != 2:
        return None
    minus, second = things
    if not isinstance(minus, fx.Node) or minus.target is not aten.neg.default:
        return None
    return [minus.args[0], second]


_Cut = tuple[int, int, int]


def _cuts(parts: list[Any] | None, x: fx.Node) -> tuple[_Cut | None, ...]:
    return tuple(_cut(part, x) for part in parts or ())


def _cut(part: Any, x: fx.Node) -> _Cut | None:
    """Return start, end and step of the slice of the last axis of ``x`` that ``part`` is."""
    if not isinstance(part, fx.Node) or part.target is not aten.slice.Tensor:
        return None
    source, dim, start, end, *rest = part.args
    step, width = rest[0] if rest else 1, sizes_of(x)[-1]
    if source is not x or dim not in (-1, 3):
        return None
    if not isinstance(start, int) or not isinstance(end, int) or not isinstance(step, int):
        return None
    assert isinstance(width, int)
    return start + width if start < 0 else start, min(end + width if end < 0 else end, width), step


def _half(e: Emitter, angles: Any, x: fx.Node, pairing: Pairing) -> ir.Value | None:
    """Return ``angles [b, 1, s, width]`` with one number for each pair: ``[b, s, width / 2]``."""
    if not isinstance(angles, fx.Node) or angles.target not in _WIDENED:
        return None
    key = ("rotary", angles.args[0], pairing, dtype_of(x), e.sizes.text(sizes_of(x)[0]))
    if key in e.memory:
        return e.memory[key]
    half = _repeated(e, angles, x) if pairing == "neighbours" else None
    if half is None:
        half = _sliced(e, angles, x, pairing)
    if half is None:
        return None
    batch, _, rows, width = sizes_of(x)
    before = (sizes_of(angles)[0], rows, int(width) // 2)
    # one row of angles for the whole batch is one too few for ONNX Runtime
    e.memory[key] = e.expand(half, before, (batch, *before[1:]))
    return e.memory[key]


def _repeated(e: Emitter, angles: fx.Node, x: fx.Node) -> ir.Value | None:
    """Return the half of angles that were repeated at the end."""
    if not _repeats_neighbours(angles) or rank_of(angles) != 4:
        return None
    half = angles.args[0]
    assert isinstance(half, fx.Node)
    if sizes_of(half)[1] != 1:
        return None
    return e.op("Squeeze", e.tensor(half, dtype_of(x)), e.builder.ints(1))


def _sliced(e: Emitter, angles: fx.Node, x: fx.Node, pairing: Pairing) -> ir.Value | None:
    """Return a half of angles ``unsqueeze(rows, 1)`` in which both of a pair are equal."""
    if angles.target is not aten.unsqueeze.default or angles.args[1] not in (1, -3):
        return None
    rows, width = angles.args[0], sizes_of(x)[-1]
    assert isinstance(width, int)
    if not isinstance(rows, fx.Node) or rank_of(rows) != 3 or sizes_of(rows)[-1] != width:
        return None
    if not _has_equal_pairs(rows, pairing):
        return None
    ints, numbers = e.builder.ints, e.tensor(rows, dtype_of(x))
    if pairing == "halves":
        return e.op("Slice", numbers, ints(0), ints(width // 2), ints(2))
    return e.op("Slice", numbers, ints(0), ints(width), ints(2), ints(2))


def _has_equal_pairs(node: fx.Node, pairing: Pairing) -> bool:
    """Tell whether the two of each pair on the last axis are equal."""
    found: Any = node
    while isinstance(found, fx.Node) and found.target in _PER_NUMBER:
        others = [a for a in found.args[1:] if isinstance(a, fx.Node)]
        if any(rank_of(a) for a in others):
            return False
        found = found.args[0]
    if not isinstance(found, fx.Node):
        return False
    if pairing == "neighbours":
        return _repeats_neighbours(found)
    if found.target is not aten.cat.default:
        return False
    parts, dim = found.args[0], found.args[1] if len(found.args) > 1 else 0
    twice = isinstance(parts, list | tuple) and len(parts) == 2 and parts[0] is parts[1]
    return twice and dim in (-1, rank_of(found) - 1)


def _repeats_neighbours(node: fx.Node) -> bool:
    """Tell whether a call repeats each number of the last axis twice."""
    last = (2, -1), (2, rank_of(node) - 1)
    return node.target is aten.repeat_interleave.self_int and node.args[1:3] in last
