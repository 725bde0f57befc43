"""Scales put into the weights of norms and linears; what is shared stays shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ...ir import ComputedWeight, Linear, Norm, Program, TensorWeight, mark, path_of
from ..norms.gains import EQUALIZED
from .scaled_channels import ScaledChannels


def put_scales(program: Program, channels: ScaledChannels, scales: Tensor) -> None:
    """Divide what makes channels by their scales, and multiply the columns that read them.

    Args:
        program: an editable copy.
        channels: of it.
        scales: of each number, float64 [count]; 1 where nothing is to be done.
    """
    edits = _Edits(program)
    for norm in channels.norms:
        made = scales[channels.made(norm)]
        if not bool((made == 1).all()):
            edits.scale_norm(norm, made)
    for linear in channels.linears:
        made, read = scales[channels.made(linear)], scales[channels.read(linear)]
        if not bool((made == 1).all() and (read == 1).all()):
            edits.scale_linear(linear, made, read)


@dataclass(slots=True)
class _Edits:
    """Makes scaled weights, one for each weight."""

    program: Program
    made: dict[str, str] = field(default_factory=dict)

    def scale_norm(self, norm: Norm, made: Tensor) -> None:
        """Divide gain and bias; a norm without a gain gets one."""
        mark(norm.node, EQUALIZED, "true")
        gain = self._divided(norm.gain, made) if norm.gain else self._gain(norm, made)
        # matched only now: the input may be a call that was edited a moment ago
        norm.set_affine(gain, self._divided(norm.bias, made) if norm.bias else None)

    def scale_linear(self, linear: Linear, made: Tensor, read: Tensor) -> None:
        """Divide rows and bias, and multiply columns."""
        weight = self._weight(linear.weight, _scaled, made, read)
        linear.set_weights(weight, self._divided(linear.bias, made) if linear.bias else None)

    def _divided(self, node: fx.Node, made: Tensor) -> fx.Node:
        return node if bool((made == 1).all()) else self._weight(node, torch.Tensor.div, made)

    def _weight(self, node: fx.Node, function: Callable[..., Tensor], *scales: Tensor) -> fx.Node:
        name = str(node.target)
        if name not in self.made:
            old = self.program.weight(name)
            inputs = (old, *map(TensorWeight, scales))
            scaled = ComputedWeight("equalize", inputs, old.shape, old.dtype, function)
            self.made[name] = self.program.add_weight(f"{name}.equalized", scaled)
        return self.program.weight_node(node.graph, self.made[name], before=node)

    def _gain(self, norm: Norm, made: Tensor) -> fx.Node:
        dtype = norm.input.meta["val"].dtype
        gain = ComputedWeight(
            "equalize-gain", (TensorWeight(made),), norm.sizes, dtype, torch.reciprocal
        )
        name = f"{path_of(norm.node) or norm.node.name}.weight.equalized"
        return self.program.weight_node(
            norm.node.graph, self.program.add_weight(name, gain), before=norm.node
        )


def _scaled(weight: Tensor, made: Tensor, read: Tensor) -> Tensor:
    return weight.double() * read / made.unsqueeze(-1)
