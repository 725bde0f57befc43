"""Our operators: schema, eager reference, shape rule and gradient of each.

Importing this module registers them, once per process.  A second copy of the package (imported
under another name) would register them again, which torch refuses with an error: see the note on
imports in CONTRIBUTING.md.

A quantised weight is given as in ``QuantizedTensor``: packed codes, scales, packed zero points or
none, and the ``bits`` and ``group_size`` of its type; it is symmetric without zero points.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .quant import QuantizedTensor, QuantType, packed_width, wider

_WEIGHT = "Tensor codes, Tensor scales, Tensor? zeros"
_TYPE = "int bits, int group_size, int in_features"
_LINEAR, _EMBEDDING = "modelathe::quantized_linear", "modelathe::quantized_embedding"
_ROTARY = "modelathe::rotary"

# not torch.library.custom_op: its first call imports the compiler, which takes a second
torch.library.define(_LINEAR, f"(Tensor x, {_WEIGHT}, Tensor? bias, {_TYPE}) -> Tensor")
torch.library.define(_EMBEDDING, f"(Tensor ids, {_WEIGHT}, {_TYPE}) -> Tensor")
torch.library.define(_ROTARY, "(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor")


@torch.library.impl(_LINEAR, "CompositeExplicitAutograd")
def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """``y[..., out] = x[..., in] @ W.T + bias[out]`` with W the dequantised weight.

    W is made in float32 at least, rounded to the dtype of ``x``, a run of rows at a time.
    """
    weight = _weight(codes, scales, zeros, bits, group_size, in_features)
    result = x.new_empty((*x.shape[:-1], codes.shape[0]))
    for rows, tile in weight.tiles():
        shift = None if bias is None else bias[rows]
        result[..., rows] = torch.nn.functional.linear(x, tile.dequantize(x.dtype), shift)
    return result


def _linear_shape(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    _check_weight(codes, scales, zeros, bits, group_size, in_features)
    _require(x.is_floating_point(), f"x is {x.dtype}, not floating-point")
    _require(x.shape[-1] == in_features, f"x is {x.shape[-1]} wide, the weight {in_features}")
    fits = bias is None or bias.shape == (codes.shape[0],)
    _require(fits, f"bias is not {[codes.shape[0]]}: one number per row")
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.impl(_EMBEDDING, "CompositeExplicitAutograd")
def quantized_embedding(
    ids: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """``y[..., in] = W[ids[...]]`` in the dtype of the scales, W the dequantised weight."""
    weight = _weight(codes, scales, zeros, bits, group_size, in_features)
    return weight.rows(_flat(ids)).dequantize().view(*ids.shape, in_features)


def _embedding_shape(
    ids: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    _check_weight(codes, scales, zeros, bits, group_size, in_features)
    whole = not ids.is_floating_point() and ids.dtype != torch.bool
    _require(whole, f"ids are {ids.dtype}, not whole numbers")
    return scales.new_empty((*ids.shape, in_features))


def _weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> QuantizedTensor:
    type_ = QuantType(bits, group_size, symmetric=zeros is None)
    return QuantizedTensor(type_, in_features, codes, scales, zeros)


def _check_weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> None:
    """Compare the shapes of a weight's parts with its type."""
    groups = QuantType(bits, group_size, symmetric=zeros is None).groups(in_features)
    out = codes.shape[0]
    parts = [("codes", codes, packed_width(in_features, bits)), ("scales", scales, groups)]
    if zeros is not None:
        parts.append(("zeros", zeros, packed_width(groups, bits)))
    for name, part, width in parts:
        _require(part.shape == (out, width), f"{name} are {list(part.shape)}, not {[out, width]}")


def _require(condition: bool, message: str) -> None:
    """Fail as torch's own shape rules do."""
    if not condition:
        raise RuntimeError(message)


def _flat(ids: Tensor) -> Tensor:
    return ids.reshape(-1).to(torch.int64)


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, zeros, bias, *ctx.type = inputs
    ctx.save_for_backward(x, codes, scales, zeros)
    ctx.has_bias = bias is not None


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """``dx = g W``, ``dW = g.T x``, ``dscale = sum over the group of dW * (code - zero)``."""
    x, codes, scales, zeros = ctx.saved_tensors
    weight = _weight(codes, scales, zeros, *ctx.type)
    flat, wide = grad.reshape(-1, codes.shape[0]), wider(grad.dtype)
    need_x, need_scales, need_bias = (ctx.needs_input_grad[i] for i in (0, 2, 4))
    x_grad = torch.zeros(x.shape, dtype=wide, device=x.device) if need_x else None
    scales_grad = torch.empty_like(scales) if need_scales else None
    for rows, tile in weight.tiles():
        if x_grad is not None:
            part = flat[:, rows] @ tile.dequantize(x.dtype)
            x_grad += part.view(x.shape)
        if scales_grad is not None:
            weight_grad = flat[:, rows].T.to(wide) @ x.reshape(-1, x.shape[-1]).to(wide)
            scales_grad[rows] = _group_sums(weight_grad, tile)
    bias_grad = flat.sum(0) if ctx.has_bias and need_bias else None
    into_x = None if x_grad is None else x_grad.to(x.dtype)
    return into_x, None, scales_grad, None, bias_grad, None, None, None


def _embedding_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, codes, scales, zeros, *ctx.type = inputs
    ctx.save_for_backward(ids, codes, scales, zeros)


def _embedding_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Each id adds ``sum over the group of g * (code - zero)`` to the scales of its row."""
    ids, codes, scales, zeros = ctx.saved_tensors
    rows = _weight(codes, scales, zeros, *ctx.type).rows(_flat(ids))
    wide = torch.zeros(scales.shape, dtype=wider(scales.dtype), device=scales.device)
    for run, tile in rows.tiles():
        part = _group_sums(grad.reshape(-1, grad.shape[-1])[run].to(wide.dtype), tile)
        wide.index_add_(0, _flat(ids)[run], part)
    return None, None, wide.to(scales.dtype), None, None, None, None


def _group_sums(weight_grad: Tensor, tile: QuantizedTensor) -> Tensor:
    """The gradient of the scales ``[rows, groups]`` from that of the weight ``[rows, in]``."""
    levels = tile.levels(weight_grad.dtype)
    return (weight_grad.view(levels.shape) * levels).sum(-1)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn each pair of channels of each head by the angle of its position.

    With x: [batch, heads, tokens, width] and cos and sin: [batch or 1, tokens, turned / 2], the
    first ``turned`` channels of a head are pairs (x1, x2), which become
    ``(x1 cos - x2 sin, x2 cos + x1 sin)``; the others stay.  The result has the dtype that torch
    gives products of ``x`` and ``cos``.

    Args:
        x: queries or keys.
        cos: the cosine of the angle of each pair.
        sin: its sine.
        interleaved: pairs are neighbours, not the same places of the two halves.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = _turned(x, cos)
    first, second = pairs(turned, interleaved)
    made = unpaired(first * cos - second * sin, second * cos + first * sin, interleaved)
    return torch.cat([made, rest], -1) if rest.shape[-1] else made


def pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return the first and the second of each pair on the last axis of ``x``."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def unpaired(first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    """Return what ``pairs`` takes apart."""
    if interleaved:
        return torch.stack([first, second], -1).flatten(-2)
    return torch.cat([first, second], -1)


def _turned(x: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
    """Return the channels that are turned, and the others."""
    width = 2 * cos.shape[-1]
    return x[..., :width], x[..., width:]


def _rotary_shape(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    parts = x, cos, sin
    _require(all(part.is_floating_point() for part in parts), "a part is not floating-point")
    _require(x.dim() == 4, f"x has {x.dim()} axes, not batch, heads, tokens and width")
    fits = cos.dim() == 3 and sin.dim() == 3 and cos.shape[-1] == sin.shape[-1]
    _require(fits, "cos and sin have not batch, tokens and one width for axes")
    width = 2 * cos.shape[-1]
    _require(0 < width <= x.shape[-1], f"{width} channels of {x.shape[-1]} cannot be turned")
    result = rotary(x, cos, sin, interleaved)
    _require(result.shape == x.shape, "there are more rows of angles than of x")
    return result


def _rotary_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, ctx.interleaved = inputs
    # angles are hardly ever trained, and keeping x for them takes memory
    ctx.save_for_backward(cos, sin, x if any(ctx.needs_input_grad[1:3]) else None)


def _rotary_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """``dx`` is ``dy`` turned back; ``dcos = x1 dy1 + x2 dy2``, ``dsin = x1 dy2 - x2 dy1``.

    Autograd sums over the batch and rounds where an operand has fewer rows or a narrower dtype.
    """
    cos, sin, x = ctx.saved_tensors
    into = torch.ops.modelathe.rotary(grad, cos, -sin, ctx.interleaved)
    if x is None:
        return into, None, None, None
    x1, x2 = pairs(_turned(x, cos)[0], ctx.interleaved)
    dy1, dy2 = pairs(_turned(grad, cos)[0], ctx.interleaved)
    return into, (x1 * dy1 + x2 * dy2).sum(1), (x1 * dy2 - x2 * dy1).sum(1), None


torch.library.impl(_ROTARY, "CompositeExplicitAutograd", rotary)
torch.library.register_fake(_LINEAR, _linear_shape)
torch.library.register_fake(_EMBEDDING, _embedding_shape)
torch.library.register_fake(_ROTARY, _rotary_shape)
torch.library.register_autograd(_LINEAR, _linear_backward, setup_context=_linear_context)
torch.library.register_autograd(_EMBEDDING, _embedding_backward, setup_context=_embedding_context)
torch.library.register_autograd(_ROTARY, _rotary_backward, setup_context=_rotary_context)
