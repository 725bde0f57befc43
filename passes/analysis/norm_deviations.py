"""What each norm divides by, on calibration text."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ...ir import Norm, Program, call_key, fingerprint
from ..context import PassContext
from ..outputs import batches, predictions, token_batch
from ..probes import Inputs


@dataclass(frozen=True, slots=True)
class Deviation:
    """What one norm divides by, as means over tokens.

    Attributes:
        usual: of all tokens that are none of the special ones.
        first: of the first token of a text; None where the norm's input has no token axis.
    """

    usual: float
    first: float | None


@dataclass(frozen=True, slots=True)
class NormDeviations:
    """What every norm divides by.

    Attributes:
        norms: by key of the norm's call (``call_key``).
        tokens: how many tokens were read.
        fingerprint: of the program that was measured.
    """

    norms: dict[str, Deviation]
    tokens: int
    fingerprint: str


def deviation(x: Tensor, kind: str, eps: float | None) -> Tensor:
    """Return what a norm divides each vector of ``x`` by: [..., width] to [...].

    ``sqrt(mean((x - mean(x))**2) + eps)`` for a layer norm, ``sqrt(mean(x**2) + eps)`` for an RMS
    norm; torch's default epsilon of the latter is that of the dtype.
    """
    small = torch.finfo(x.dtype).eps if eps is None else eps
    if kind == "layer":
        return (x.var(-1, correction=0) + small).sqrt()
    return (x.square().mean(-1) + small).sqrt()


def norm_deviations(program: Program, context: PassContext) -> NormDeviations:
    """Measure the deviation of every norm's input on the calibration text.

    Args:
        program: reads tokens.
        context: holds the calibration text.

    Raises:
        DataError: there is no calibration text, and none can be made up.

    Source: arXiv 2507.02559: the mean over tokens of each token's deviation.
    """
    windows = context.calibration_tokens(program).tokens
    end = program.config.get("eos_token_id")
    meter = _Meter(program, end if isinstance(end, int) else None)

    def run(inputs: Inputs, graph: str) -> dict[str, Tensor]:
        return program.run(
            inputs, graph, observe=meter.observe, dtype=torch.float32, device=context.device
        )

    with context.progress.task("measuring norms", total=len(windows)) as advance:
        for batch in batches(windows):
            meter.tokens = batch.to(context.device)
            predictions(program, token_batch(program, batch), run)
            advance(len(batch))
    return NormDeviations(meter.means(), windows.numel(), fingerprint(program))


@dataclass(slots=True)
class _Meter:
    """Sums deviations while a program runs, in float64."""

    program: Program
    end: int | None
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))
    sums: dict[str, list[float]] = field(default_factory=dict)
    _norms: dict[fx.Node, list[tuple[str, Norm]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, graph in self.program.graphs.items():
            for node in graph.nodes:
                if (norm := Norm.match(node)) is not None:
                    self._norms.setdefault(norm.input, []).append((call_key(name, node), norm))

    def observe(self, node: fx.Node, value: Tensor) -> None:
        for key, norm in self._norms.get(node, ()):
            found = deviation(value, norm.kind, norm.eps).double()
            sums = self.sums.setdefault(key, [0.0, 0, 0.0, 0])
            if found.shape != self.tokens.shape:
                sums[0] += float(found.sum())
                sums[1] += found.numel()
                continue
            usual = torch.ones_like(self.tokens, dtype=torch.bool)
            usual[:, 0] = False
            if self.end is not None:
                usual &= self.tokens != self.end
            sums[0] += float(found[usual].sum())
            sums[1] += int(usual.sum())
            sums[2] += float(found[:, 0].sum())
            sums[3] += len(found)

    def means(self) -> dict[str, Deviation]:
        return {
            name: Deviation(
                _short(total / max(1, count)), _short(first / firsts) if firsts else None
            )
            for name, (total, count, first, firsts) in self.sums.items()
        }


def _short(value: float) -> float:
    """Round to six digits: the rest differs from machine to machine."""
    return float(f"{value:.6g}")
