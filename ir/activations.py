"""Activations rounded to whole steps in front of a linear, so that it can multiply integers.

Dynamic, without a scale: each token x: [width] has a step of its own, with h = 2**(bits - 1) - 1,

    step = max |x| / h        x' = step * round(x / step)

so |x' - x| <= step / 2, and what other tokens there are changes nothing.  Static, with a scale and
a zero point that are weights, n = 2**bits - 1:

    x' = scale * (clip(round(x / scale) + zero, 0, n) - zero)

so |x' - x| <= scale / 2 within the range that the codes 0 .. n cover, and x' is the range's end
beyond it.  Gradients pass straight through, but for numbers that were clipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx

from .calls import argument
from .quant import wider

WIDTHS = (7, 8)

_ROUND = "modelathe::round_activations"


def round_activations(x: Tensor, scale: Tensor | None, zero: Tensor | None, bits: int) -> Tensor:
    """Round ``x [..., width]`` to codes of ``bits``; return what they stand for, in x's dtype.

    Computed in float32 at least.

    Args:
        x: activations.
        scale: of all codes, a scalar; None: each row of ``x`` has its own.
        zero: the code of zero, a uint8 scalar; given with a scale.
        bits: 7 or 8.
    """
    wide = x.to(wider(x.dtype))
    if scale is None:
        step = dynamic_step(wide, bits)
        return (wide / step).round_().mul_(step).to(x.dtype)
    assert zero is not None
    step, middle = scale.to(wide.dtype), zero.to(wide.dtype)
    codes = (wide / step).round_().add_(middle).clamp_(0, largest_code(bits))
    return codes.sub_(middle).mul_(step).to(x.dtype)


def dynamic_step(x: Tensor, bits: int) -> Tensor:
    """Return the step of each row of ``x [..., width]``, ``[..., 1]``; 1 for a row of zeros."""
    largest = x.abs().amax(-1, keepdim=True)
    return torch.where(largest == 0, 1.0, largest / (middle_code(bits) - 1))


def largest_code(bits: int) -> int:
    """Return the largest code."""
    return (1 << bits) - 1


def middle_code(bits: int) -> int:
    """Return the code of zero where the step is dynamic."""
    return 1 << (bits - 1)


def _shape(x: Tensor, scale: Tensor | None, zero: Tensor | None, bits: int) -> Tensor:
    if bits not in WIDTHS or not x.is_floating_point() or not x.dim():
        raise RuntimeError(f"{bits} bits do not fit {x.dtype} {list(x.shape)}")
    if (scale is None) != (zero is None):
        raise RuntimeError("a scale and a zero point are given together, or neither is")
    if zero is not None and zero.dtype != torch.uint8:
        raise RuntimeError(f"the zero point is {zero.dtype}, not uint8")
    if any(part is not None and part.dim() for part in (scale, zero)):
        raise RuntimeError("scale and zero point are scalars")
    return torch.empty_like(x)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero, ctx.bits = inputs
    ctx.static = scale is not None
    if ctx.static:
        ctx.save_for_backward(x, scale, zero)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.static:
        return grad, None, None, None
    x, scale, zero = ctx.saved_tensors
    codes = (x / scale).round_().add_(zero)
    inside = (codes >= 0) & (codes <= largest_code(ctx.bits))
    return grad * inside, None, None, None


torch.library.define(_ROUND, "(Tensor x, Tensor? scale, Tensor? zero, int bits) -> Tensor")
torch.library.impl(_ROUND, "CompositeExplicitAutograd", round_activations)
torch.library.register_fake(_ROUND, _shape)
torch.library.register_autograd(_ROUND, _backward, setup_context=_context)


@dataclass(frozen=True, slots=True)
class RoundedActivations:
    """Activations that are rounded; see ``round_activations``."""

    node: fx.Node
    input: fx.Node
    scale: fx.Node | None
    zero: fx.Node | None
    bits: int

    @classmethod
    def match(cls, node: fx.Node) -> Self | None:
        """Return the view, or None when ``node`` is another call."""
        if node.target is not torch.ops.modelathe.round_activations.default:
            return None
        parts = [argument(node, i, name) for i, name in enumerate(_PARTS)]
        return cls(node, *parts)


_PARTS = ("x", "scale", "zero", "bits")


def rounded_activations(graph: fx.Graph) -> tuple[RoundedActivations, ...]:
    """Return the calls of a graph that round activations, in order."""
    views = (RoundedActivations.match(node) for node in graph.nodes)
    return tuple(view for view in views if view is not None)
