"""A norm in training that becomes a RepBN, a little more with every step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Parameter
from torch.nn.functional import batch_norm

from ...ir import Norm, Program
from ..analysis.channel_moments import ChannelMoments
from ..context import PassContext
from ..outputs import batches, predictions, token_batch
from ..probes import Inputs
from ..training.switches import Switch
from .rep_batch_norm import EPS, RepParameters, check_fits

_MOMENTUM = 0.1  # share of the running statistics that a batch replaces
_TURNING = 0.4  # share of a run in which norms give way


class RepSwitch(Switch):
    """One norm, of which ``share`` is left: ``y = share norm(x) + (1 - share) RepBN(x)``.

    ``alpha`` is learned as a multiple of ``1 / scale``, the largest deviation of a channel when
    training began: optimizers take steps of the size of the rate, and one of ``alpha`` itself would
    move the results by the rate times x, which in a residual stream can be hundreds.

    Args:
        norm: the call that it replaces, over the last dimension.
        start: what the RepBN holds to begin with.
    """

    def __init__(self, norm: Norm, start: RepParameters) -> None:
        super().__init__()
        self.norm: Any = norm.node.target
        scale = (start.variance.max() + EPS).sqrt()
        learned = {"gain": start.gain, "bias": start.bias, "multiple": start.alpha * scale}
        measured = {"mean": start.mean, "variance": start.variance, "scale": scale}
        for name, value in learned.items():
            self.register_parameter(name, Parameter(value.to(torch.float32, copy=True)))
        for name, value in {**measured, "share": torch.ones(())}.items():
            self.register_buffer(name, value.to(torch.float32, copy=True))

    gain: Parameter
    bias: Parameter
    multiple: Parameter
    mean: Tensor
    variance: Tensor
    scale: Tensor
    share: Tensor

    @property
    def turned(self) -> float:
        return 1.0 - float(self.share)

    @property
    def live(self) -> bool:
        return bool(self.share > 0)

    @property
    def rep(self) -> RepParameters:
        """What the RepBN holds; float32."""
        held = (self.gain, self.bias, self.mean, self.variance, self.multiple / self.scale)
        return RepParameters(*(value.detach() for value in held))

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """Take the arguments of ``layer_norm`` or ``rms_norm``."""
        share, rows = float(self.share), x.flatten(0, -2)
        by_batch = self.training and share > 0 and len(rows) > 1  # one vector has no variance
        normal = batch_norm(
            rows, self.mean, self.variance, self.gain, self.bias, by_batch, _MOMENTUM, EPS
        )
        rep = normal.reshape(x.shape) + self.multiple / self.scale * x
        return rep.lerp(self.norm(x, *rest), share)


def share_at(step: int, steps: int) -> float:
    """Return the share of the norm that is left at a step, from 0, of so many."""
    return max(0.0, 1.0 - step / (_TURNING * steps))


def rep_switches(
    program: Program, calls: Iterable[fx.Node], tokens: Tensor, context: PassContext
) -> dict[fx.Node, RepSwitch]:
    """Return switches that start from what fits the norms of ``program`` best.

    Args:
        program: reads tokens.
        calls: norms over the last dimension.
        tokens: to measure on, int64 [windows, length].
        context: says where to compute, and who is told.

    Raises:
        PassError: the RepBN of one would not fit into the dtype of what the norm reads.
    """
    meter = _Meter({node: norm for node in calls if (norm := Norm.match(node)) is not None})

    def run(inputs: Inputs, graph: str) -> dict[str, Tensor]:
        return program.run(inputs, graph, meter.observe, torch.float32, device=context.device)

    with context.progress.task("measuring norms", total=len(tokens)) as advance:
        for batch in batches(tokens):
            predictions(program, token_batch(program, batch), run)
            advance(len(batch))
    made = {}
    for node, norm in meter.norms.items():
        start = RepParameters.fitted(meter.found[node])
        check_fits(norm, start)  # now, and not when training is over
        made[node] = RepSwitch(norm, start)
    return made


class _Meter:
    """Gathers the moments of norms while their program runs."""

    def __init__(self, norms: dict[fx.Node, Norm]) -> None:
        self.norms = norms
        self.found: dict[fx.Node, ChannelMoments] = {}
        self._inputs: dict[fx.Node, Tensor] = {}
        self._readers = {norm.input: node for node, norm in norms.items()}  # the last of each

    def observe(self, node: fx.Node, value: Tensor) -> None:
        if node in self._readers:
            self._inputs[node] = value
        if (norm := self.norms.get(node)) is None:
            return
        moments = ChannelMoments.of(self._inputs[norm.input], value)
        known = self.found.get(node)
        self.found[node] = moments if known is None else known.merged(moments)
        if self._readers[norm.input] is node:
            del self._inputs[norm.input]
