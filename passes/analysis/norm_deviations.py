"""What each norm divides by, on calibration text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ...ir import Norm, Program, call_key, fingerprint
from ...ir.config import end_tokens
from ..context import PassContext
from ..outputs import batches, predictions, token_batch
from ..probes import Inputs


@dataclass(frozen=True, slots=True)
class Deviation:
    """What one norm divides by, as means over tokens.

    Attributes:
        usual: of all tokens that are none of the special ones.
        first: of the first token of a text; None where the norm's input has no token axis.
        spread: one standard deviation of those that ``usual`` is the mean of.
    """

    usual: float
    first: float | None
    spread: float = 0.0


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
    meter = _Meter(program, end_tokens(program.config))

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
class _Sums:
    """What one norm divides by, summed up: the usual ones, their squares, and the first ones."""

    usual: float = 0.0
    squares: float = 0.0
    count: int = 0
    first: float = 0.0
    firsts: int = 0

    def add(self, usual: Tensor, first: Tensor | None) -> None:
        self.usual += float(usual.sum())
        self.squares += float(usual.square().sum())
        self.count += usual.numel()
        if first is not None:
            self.first += float(first.sum())
            self.firsts += first.numel()

    def mean(self) -> Deviation:
        count = max(1, self.count)
        usual = self.usual / count
        spread = max(0.0, self.squares / count - usual**2) ** 0.5
        first = _short(self.first / self.firsts) if self.firsts else None
        return Deviation(_short(usual), first, _short(spread))


def usual_tokens(tokens: Tensor, ends: Sequence[int]) -> Tensor:
    """Return which of the ``tokens [b, s]`` neither begin their row nor end a text."""
    usual = ~torch.isin(tokens, tokens.new_tensor(ends))
    usual[:, 0] = False
    return usual


@dataclass(slots=True)
class _Meter:
    """Sums deviations while a program runs, in float64."""

    program: Program
    ends: tuple[int, ...]
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))
    sums: dict[str, _Sums] = field(default_factory=lambda: defaultdict(_Sums))
    _norms: dict[fx.Node, list[tuple[str, Norm]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, graph in self.program.graphs.items():
            for node in graph.nodes:
                if (norm := Norm.match(node)) is not None:
                    self._norms.setdefault(norm.input, []).append((call_key(name, node), norm))

    def observe(self, node: fx.Node, value: Tensor) -> None:
        for key, norm in self._norms.get(node, ()):
            found = deviation(value, norm.kind, norm.eps).double()
            if found.shape != self.tokens.shape:
                self.sums[key].add(found, None)
                continue
            self.sums[key].add(found[usual_tokens(self.tokens, self.ends)], found[:, 0])

    def means(self) -> dict[str, Deviation]:
        return {name: sums.mean() for name, sums in self.sums.items()}


def _short(value: float) -> float:
    """Round to six digits: the rest differs from machine to machine."""
    return float(f"{value:.6g}")
