"""What norms do to each channel: means, variances and covariances of inputs and results."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...ir import Norm, Program
from ..outputs import batches, predictions, token_batch
from ..probes import Inputs


@dataclass(frozen=True, slots=True)
class ChannelMoments:
    """Of a norm's inputs x and results y, for each channel: the last dimension of both.

    Attributes:
        count: how many vectors they are taken over.
        mean: of x; float64 [channels], as the others.
        variance: of x; the mean square, not corrected for the sample.
        output_mean: of y.
        covariance: of x and y; not corrected either.
    """

    count: int
    mean: Tensor
    variance: Tensor
    output_mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> ChannelMoments:
        """Return the moments of ``x`` and ``y``, both [..., channels]."""
        x, y = (value.detach().double().flatten(0, -2).cpu() for value in (x, y))
        mean, output_mean = x.mean(0), y.mean(0)
        off = x - mean
        variance, covariance = (off * off).mean(0), (off * (y - output_mean)).mean(0)
        return cls(len(x), mean, variance, output_mean, covariance)

    def merged(self, other: ChannelMoments) -> ChannelMoments:
        """Return the moments of both samples together.

        Source: Chan, Golub and LeVeque (1979), for sums of squares that do not cancel.
        """
        count = self.count + other.count
        share = other.count / count
        step, output_step = other.mean - self.mean, other.output_mean - self.output_mean
        between = share * (1 - share)
        return ChannelMoments(
            count,
            self.mean + share * step,
            torch.lerp(self.variance, other.variance, share) + between * step * step,
            self.output_mean + share * output_step,
            torch.lerp(self.covariance, other.covariance, share) + between * step * output_step,
        )


def norm_moments(
    program: Program, reference: Program, graph: str, norm: fx.Node, tokens: Tensor, device: str
) -> ChannelMoments:
    """Measure what a norm of ``program`` reads against what it gives in ``reference``.

    Both run in float32, a few windows at a time, as far as the norm; moments are in float64.

    Args:
        program: reads tokens; norms before this one may have been replaced.
        reference: where the norm, a call of the same name, has its results y from.
        graph: which graph of both.
        norm: a call of ``program`` over the last dimension.
        tokens: int64 [windows, length].
        device: where to compute.
    """
    view = Norm.match(norm)
    assert view is not None
    (result,) = (node for node in reference.graphs[graph].nodes if node.name == norm.name)
    found: ChannelMoments | None = None
    for batch in batches(tokens):
        x = _value(program, graph, view.input, batch, device)
        y = _value(reference, graph, result, batch, device)
        moments = ChannelMoments.of(x, y)
        found = found.merged(moments) if found is not None else moments
    assert found is not None
    return found


class _Reached(Exception):  # noqa: N818 (no error: the way out of a run)
    """A run came to the value that it was for."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def _value(program: Program, graph: str, wanted: fx.Node, tokens: Tensor, device: str) -> Tensor:
    """Return the value of a node, and compute nothing behind it."""

    def observe(node: fx.Node, value: Tensor) -> None:
        if node is wanted:
            raise _Reached(value)

    def run(inputs: Inputs, name: str) -> dict[str, Tensor]:
        watch = observe if name == graph else None
        return program.run(inputs, name, watch, torch.float32, device=device)

    try:
        predictions(program, token_batch(program, tokens), run)
    except _Reached as reached:
        return reached.value
    raise AssertionError(f"%{wanted.name} is not in {graph}")
