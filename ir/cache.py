"""Cached keys and values as codes: how they are rounded and packed, and the calls that do it.

A new key or value ``x: [..., heads, tokens, width]`` is rounded per token and head, over its width,
when it is appended.  With lo = min(x, 0), hi = max(x, 1e-5) and n = 2**bits - 1:

    scale = (hi - lo) / n      zero = round(-lo / scale)
    code  = clip(round(x / scale) + zero, 0, n)      x' = (code - zero) * scale

so |x' - x| <= scale / 2.  Codes of less than 8 bits are packed in planes: with w = width * bits / 8
bytes, byte j holds the codes of channels j, j + w, j + 2 w, ..., low bits first.  Planes are made
and read by whole slices, where neighbours in one byte would need a stride.

This is the round-to-nearest of KVTuner (arXiv 2502.04420, its vanilla quantiser: per token,
asymmetric) but for one thing: the range holds zero, so that the zero point is a code and fits a
byte.  Both are the same wherever a token has channels on both sides of zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx

from .calls import argument
from .quant import wider

WIDTHS = (2, 4, 8)
SMALLEST_RANGE = 1e-5  # KVTuner's; nothing is divided by zero

_QUANTIZE, _DEQUANTIZE = "modelathe::quantize_cache", "modelathe::dequantize_cache"


def entry_parts(name: str) -> tuple[str, str, str]:
    """Return what a cache entry's codes, scales and zero points are called in a signature."""
    return name, f"{name}_scale", f"{name}_zero"


def quantize_cache(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round ``x [..., width]`` over its last axis.

    Rounding is done in float32 at least, after the scale was rounded to the dtype of ``x``.

    Returns:
        codes, uint8 ``[..., width * bits / 8]``; scales ``[..., 1]`` in the dtype of ``x``; zero
        points, uint8 ``[..., 1]``.
    """
    wide = x.to(wider(x.dtype))
    below = (-wide.amin(-1, keepdim=True)).clamp_min(0)
    above = wide.amax(-1, keepdim=True).clamp_min(SMALLEST_RANGE)
    scales = ((below + above) * step_factor(bits, x.dtype)).to(x.dtype)
    step = scales.to(wide.dtype)
    zeros = (below / step).round_()
    codes = (wide / step).round_().add_(zeros).clamp_(0, (1 << bits) - 1)
    return pack_planes(codes.to(torch.uint8), bits), scales, zeros.to(torch.uint8)


def step_factor(bits: int, dtype: torch.dtype) -> float:
    """Return what a token's range is multiplied with to give the scale: ``1 / n``, a bit more.

    Rounding the scale to ``dtype`` can then not make it too small for the range.
    """
    return (1 + torch.finfo(dtype).eps) / ((1 << bits) - 1)


def dequantize_cache(
    codes: Tensor, scales: Tensor, zeros: Tensor, newest: Tensor, bits: int
) -> Tensor:
    """``(code - zero) * scale``, ``[..., tokens, width]`` in the dtype of the scales.

    ``newest`` is what the last tokens were rounded from.  Its numbers are not used: it is where
    the gradient goes, as if nothing had been rounded (straight through).
    """
    wide = wider(scales.dtype)
    levels = unpack_planes(codes, bits).to(wide).sub_(zeros.to(wide))
    return levels.mul_(scales.to(wide)).to(scales.dtype)


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Pack ``codes [..., width]``, uint8, into ``[..., width * bits / 8]`` bytes.

    >>> pack_planes(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 4).tolist()
    [49, 66]
    """
    if bits == 8:
        return codes
    planes = codes.chunk(8 // bits, dim=-1)
    packed = planes[0].clone()
    for number, plane in enumerate(planes[1:], 1):
        packed |= plane << (number * bits)
    return packed


def unpack_planes(packed: Tensor, bits: int) -> Tensor:
    """Return the codes ``[..., width]``, uint8, that ``pack_planes`` packed."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1)


def packs(width: int, bits: int) -> bool:
    """Tell whether ``width`` codes fill whole bytes."""
    return width * bits % 8 == 0


def _quantize_shape(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    if bits not in WIDTHS or not x.is_floating_point() or not packs(int(x.shape[-1]), bits):
        raise RuntimeError(f"{bits} bits do not fit {x.dtype} {list(x.shape)}")
    shape = x.shape[:-1]
    codes = x.new_empty((*shape, int(x.shape[-1]) * bits // 8), dtype=torch.uint8)
    return codes, x.new_empty((*shape, 1)), x.new_empty((*shape, 1), dtype=torch.uint8)


def _dequantize_shape(
    codes: Tensor, scales: Tensor, zeros: Tensor, newest: Tensor, bits: int
) -> Tensor:
    width = int(codes.shape[-1]) * 8 // bits
    if codes.dtype != torch.uint8 or zeros.dtype != torch.uint8 or width != newest.shape[-1]:
        raise RuntimeError(f"codes {list(codes.shape)} of {bits} bits are not {newest.shape[-1]}")
    if scales.shape != zeros.shape or (*scales.shape[:-1], 1) != (*codes.shape[:-1], 1):
        raise RuntimeError(f"scales {list(scales.shape)} do not fit codes {list(codes.shape)}")
    return scales.new_empty((*codes.shape[:-1], width))


def _quantize_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output)


def _quantize_backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
    """Rounding has no slope; ``dequantize_cache`` hands the gradient past it."""
    return None, None


def _dequantize_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.tokens = inputs[3].shape[-2]


def _dequantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return None, None, None, grad[..., grad.shape[-2] - ctx.tokens :, :], None


torch.library.define(_QUANTIZE, "(Tensor x, int bits) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    _DEQUANTIZE, "(Tensor codes, Tensor scales, Tensor zeros, Tensor newest, int bits) -> Tensor"
)
torch.library.impl(_QUANTIZE, "CompositeExplicitAutograd", quantize_cache)
torch.library.impl(_DEQUANTIZE, "CompositeExplicitAutograd", dequantize_cache)
torch.library.register_fake(_QUANTIZE, _quantize_shape)
torch.library.register_fake(_DEQUANTIZE, _dequantize_shape)
torch.library.register_autograd(_QUANTIZE, _quantize_backward, setup_context=_quantize_context)
torch.library.register_autograd(
    _DEQUANTIZE, _dequantize_backward, setup_context=_dequantize_context
)


@dataclass(frozen=True, slots=True)
class CachedCodes:
    """Keys or values read from codes; see ``dequantize_cache``."""

    node: fx.Node
    codes: fx.Node
    scales: fx.Node
    zeros: fx.Node
    newest: fx.Node
    bits: int

    @classmethod
    def match(cls, node: fx.Node) -> Self | None:
        """Return the view, or None when ``node`` is another call."""
        if node.target is not torch.ops.modelathe.dequantize_cache.default:
            return None
        parts = [argument(node, i, name) for i, name in enumerate(_PARTS)]
        return cls(node, *parts)


_PARTS = ("codes", "scales", "zeros", "newest", "bits")


def reads_codes(graph: fx.Graph) -> tuple[CachedCodes, ...]:
    """Return the calls of a graph that read keys or values from codes, in order."""
    return tuple(view for node in graph.nodes if (view := CachedCodes.match(node)) is not None)
