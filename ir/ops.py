"""Our operators: schema, eager reference, shape rule and gradient of each.

Importing this module registers them, once per process.  A second copy of the package (imported
under another name) would register them again, which torch refuses with an error: see the note on
imports in CONTRIBUTING.md.

The weight is given as in ``QuantizedTensor``: packed codes, scales, packed zero points or none, and
the ``bits`` and ``group_size`` of its type; it is symmetric when there are no zero points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .quant import QuantizedTensor, QuantType, packed_width, wider

_WEIGHT = "Tensor codes, Tensor scales, Tensor? zeros"
_TYPE = "int bits, int group_size, int in_features"
_LINEAR, _EMBEDDING = "modelathe::quantized_linear", "modelathe::quantized_embedding"

# not torch.library.custom_op: its first call imports the compiler, which takes a second
torch.library.define(_LINEAR, f"(Tensor x, {_WEIGHT}, Tensor? bias, {_TYPE}) -> Tensor")
torch.library.define(_EMBEDDING, f"(Tensor ids, {_WEIGHT}, {_TYPE}) -> Tensor")


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


torch.library.register_fake(_LINEAR, _linear_shape)
torch.library.register_fake(_EMBEDDING, _embedding_shape)
torch.library.register_autograd(_LINEAR, _linear_backward, setup_context=_linear_context)
torch.library.register_autograd(_EMBEDDING, _embedding_backward, setup_context=_embedding_context)

OPERATORS: Sequence[torch._ops.OpOverload] = (
    torch.ops.modelathe.quantized_linear.default,
    torch.ops.modelathe.quantized_embedding.default,
)
