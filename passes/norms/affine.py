"""Affine maps of channels, and the weights of a linear or convolution that has taken one in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ...ir import BatchNorm, ComputedWeight, Convolution, Linear, Program, Weight

Product = Linear | Convolution
# Which side of a product the map is on: what it reads is mapped, or what it gives.
Side = Literal["inputs", "outputs"]


@dataclass(frozen=True, slots=True)
class ChannelMap:
    """``y = a x + c``, with one ``a`` and one ``c`` for each channel.

    As batch norm by fixed statistics computes it, plus ``alpha`` times its input::

        a = gain / sqrt(variance + eps) + alpha
        c = bias - gain * mean / sqrt(variance + eps)

    Attributes:
        mean: [channels].
        variance: [channels].
        gain: [channels]; None stands for 1.
        bias: [channels]; None stands for 0.
        eps: added to the variance.
        alpha: a number, or a weight of one element.
    """

    mean: Weight
    variance: Weight
    gain: Weight | None
    bias: Weight | None
    eps: float
    alpha: Weight | float = 0.0

    @classmethod
    def of(cls, program: Program, norm: BatchNorm, alpha: Weight | float = 0.0) -> ChannelMap:
        """Return the map of a batch norm, plus ``alpha`` times its input."""
        gain, bias = (
            None if part is None else program.weight(part) for part in (norm.gain, norm.bias)
        )
        mean, variance = program.weight(norm.mean), program.weight(norm.variance)
        return cls(mean, variance, gain, bias, norm.eps, alpha)

    @property
    def inputs(self) -> tuple[Weight, ...]:
        """The weights that ``coefficients`` takes."""
        found = (self.mean, self.variance, self.gain, self.bias, self.alpha)
        return tuple(part for part in found if isinstance(part, Weight))

    @property
    def rule(self) -> str:
        """What the map does with its inputs, as text."""
        alpha = "given" if isinstance(self.alpha, Weight) else self.alpha
        given = [name for name in ("gain", "bias") if getattr(self, name) is not None]
        return f"eps={self.eps} alpha={alpha} {' '.join(given)}"

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for maps that are equal."""
        return self.rule, *(weight.fingerprint for weight in self.inputs)

    def coefficients(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``a`` and ``c`` in float64, each [channels], from the tensors of ``inputs``."""
        mean, variance, *others = (tensor.double() for tensor in inputs)
        rest = iter(others)
        gain = torch.ones_like(mean) if self.gain is None else next(rest)
        bias = torch.zeros_like(mean) if self.bias is None else next(rest)
        alpha = next(rest).reshape(()) if isinstance(self.alpha, Weight) else self.alpha
        slope = gain / torch.sqrt(variance + self.eps)
        return slope + alpha, bias - slope * mean

    def weights(self, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Weight, Weight]:
        """Return ``a`` and ``c`` as weights of that shape, each rounded once."""

        def part(index: int, *inputs: Tensor) -> Tensor:
            return self.coefficients(*inputs)[index].reshape(shape)

        names = ("channel-scale", "channel-shift")
        made = [
            ComputedWeight(f"{name} {self.rule}", self.inputs, shape, dtype, partial(part, index))
            for index, name in enumerate(names)
        ]
        return made[0], made[1]


def layout(product: Product) -> tuple[int, bool]:
    """Return the number of groups, and whether inputs are the first dimension of the weight."""
    return (1, False) if isinstance(product, Linear) else (product.groups, product.transposed)


def folded_weights(
    program: Program, product: Product, channels: ChannelMap, side: Side
) -> tuple[Weight, Weight]:
    """Return weight and bias of a product that has taken a map in.

    With ``W: [out, in]`` and ``b: [out]``, for each tap of a kernel and within each group::

        side = "outputs":  a (W x + b) + c  =  (diag(a) W) x + (a b + c)
        side = "inputs":   W (a x + c) + b  =  (W diag(a)) x + (b + W c)

    where ``W c`` sums over the taps too.  In float64, rounded once, to the dtype of ``W``.
    """
    weight, dtype = program.weight(product.weight), program.weight(product.weight).dtype
    bias = None if product.bias is None else program.weight(product.bias)
    shape, (groups, transposed) = weight.shape, layout(product)
    rule = f"{side} groups={groups} transposed={transposed} {channels.rule}"
    count = shape[1] * groups if transposed else shape[0]

    def matrix(value: Tensor, *inputs: Tensor) -> Tensor:
        scale, _ = channels.coefficients(*inputs)
        across = (groups, -1, 1, 1) if side == "outputs" else (groups, 1, -1, 1)
        parts = _split(value, groups, transposed) * scale.reshape(across)
        return (parts.transpose(1, 2) if transposed else parts).reshape(shape)

    def offset(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        value = None if side == "outputs" else next(given)
        old = torch.zeros(count, dtype=torch.float64) if bias is None else next(given).double()
        scale, shift = channels.coefficients(*given)
        if value is None:
            return scale * old + shift
        taps = _split(value, groups, transposed).sum(-1)
        return old + torch.bmm(taps, shift.reshape(groups, -1, 1)).flatten()

    read = [weight] if side == "inputs" else []
    read += [] if bias is None else [bias]
    biased = "" if bias is None else " biased"
    return (
        ComputedWeight(f"fold-map {rule}", (weight, *channels.inputs), shape, dtype, matrix),
        ComputedWeight(
            f"fold-shift {rule}{biased}", (*read, *channels.inputs), (count,), dtype, offset
        ),
    )


def _split(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """Return the weight in float64 as [groups, out / groups, in / groups, taps]."""
    sizes = (groups, weight.shape[0] // groups, weight.shape[1])
    parts = weight.double().reshape(*sizes, -1)
    return parts.transpose(1, 2) if transposed else parts
