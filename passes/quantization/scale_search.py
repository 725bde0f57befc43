"""How channels are scaled: the scales at which rounding costs least, on real inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...ir import PassError
from ...ir.activations import round_activations
from ...ir.quant import QuantType, quantize

Kind = Literal["awq", "smooth"]
_SAMPLE = 1024  # vectors that are kept for kind=smooth
_WIDEST = 2.0**8  # no scale is larger, nor smaller than its inverse: float16 holds what is scaled
_RATE = 0.03  # of descent, on logarithms of scales
_ROWS = 512  # of each weight that a step of descent looks at
_EVERY = 10  # steps between two looks at all rows


@dataclass(slots=True)
class Observed:
    """What linears read, on the calibration text.

    Attributes:
        size: of each channel: mean of |x| for awq, largest |x| for smooth; [in].
        data: second moments [in, in] for awq, some of the vectors [tokens, in] for smooth.
    """

    size: Tensor
    data: Tensor

    @classmethod
    def of(cls, kind: Kind, batches: Iterator[Tensor], count: int, name: str) -> Observed:
        """Take what is needed from the values [..., in] of a call.

        Args:
            kind: says what.
            batches: of values.
            count: how many batches there are.
            name: of the call, for messages.

        Raises:
            PassError: a value is not finite.
        """
        sizes: list[Tensor] = []
        data: list[Tensor] = []
        tokens = 0
        for value in batches:
            x = value.reshape(-1, value.shape[-1])
            tokens += len(x)
            if kind == "awq":
                sizes.append(x.abs().sum(0))
                data = [x.T @ x if not data else data[0].addmm_(x.T, x)]
            else:
                sizes.append(x.abs().amax(0))
                data.append(x[:: max(1, len(x) * count // _SAMPLE)].clone())
        size = torch.stack(sizes).sum(0) / tokens if kind == "awq" else torch.stack(sizes).amax(0)
        if not bool(size.isfinite().all()):
            raise PassError(
                f"%{name} is not finite on the calibration text",
                remedy="use another calibration text; inspect shows which weights are damaged",
            )
        return cls(size, data[0] / tokens if kind == "awq" else torch.cat(data))


@dataclass(frozen=True, slots=True)
class Reading:
    """A linear that reads scaled channels.

    Attributes:
        weight: [out, in], float32.
        scales: int64 [in]: which scale each column takes; -1: none.
        seen: what it reads.
    """

    weight: Tensor
    scales: Tensor
    seen: Observed

    def spread(self, scales: Tensor) -> Tensor:
        """Return the factor of each column, in the dtype of the weight."""
        chosen = scales.to(self.weight)[self.scales.clamp_min(0)]
        return torch.where(self.scales < 0, 1.0, chosen)


@dataclass(frozen=True, slots=True)
class Found:
    """The best scales.

    Attributes:
        strength: alpha, or where descent began; None: nothing is better than no scales.
        scales: float64 [count].
        share: of the error without scales that is left.
    """

    strength: float | None
    scales: Tensor
    share: float


@dataclass(frozen=True, slots=True)
class Search:
    """Tries scales.

    Attributes:
        kind: which formula and which error.
        qtype: number type of the weights.
        grid: strengths 0, 1/grid, ... 1 are tried.
        refine: steps of descent from the best of them.
    """

    kind: Kind
    qtype: QuantType
    grid: int
    refine: int

    def best(self, readings: Sequence[Reading], count: int) -> Found:
        """Return the scales of channels at which the readers' results lose least.

        Args:
            readings: all that read the channels.
            count: of the scales.
        """
        plain = torch.ones(count, dtype=torch.float64)
        without = self._lost(readings, plain)
        found = Found(None, plain, 1.0)
        if without == 0:
            return found
        sizes = _largest(readings, [one.seen.size for one in readings], count)
        peaks = _largest(readings, [one.weight.abs().amax(0) for one in readings], count)
        for alpha in torch.linspace(0, 1, self.grid + 1).tolist():
            raw = sizes**alpha
            if self.kind == "smooth":
                raw = raw / peaks ** (1 - alpha)
            scales = (raw / (raw.max() * raw.min()).sqrt()).clamp(1 / _WIDEST, _WIDEST)
            share = self._lost(readings, scales) / without
            if share < found.share:
                found = Found(alpha, scales, share)
        return self._descend(readings, found, without) if self.refine else found

    def _descend(self, readings: Sequence[Reading], found: Found, without: float) -> Found:
        """Follow the gradient of the error to each scale; return the best scales on the way.

        Each error of rounding is taken for a constant share of its group's range, which the scales
        move; a step looks at some rows of each weight, drawn anew.
        """
        start = found.strength or 0.0
        generator = torch.Generator().manual_seed(0)
        bound = torch.tensor(_WIDEST).log().item()
        logs = found.scales.log().float().requires_grad_(True)
        adam = torch.optim.Adam([logs], lr=_RATE)
        for step in range(1, self.refine + 1):
            adam.param_groups[0]["lr"] = _RATE * (1 - (step - 1) / self.refine)
            adam.zero_grad()
            for one in readings:
                rows = torch.randperm(len(one.weight), generator=generator)[:_ROWS]
                self._slope(one, rows, logs)
            adam.step()
            if step % _EVERY == 0 or step == self.refine:
                scales = logs.detach().double().clamp(-bound, bound).exp()
                share = self._lost(readings, scales) / without
                if share < found.share:
                    found = Found(start, scales, share)
        return found

    def _slope(self, one: Reading, rows: Tensor, logs: Tensor) -> None:
        """Add the gradient of one reader's error."""
        weight = one.weight[rows.to(one.weight.device)]
        with torch.enable_grad():
            factors = one.spread(logs.exp())
            scaled = weight * factors
            groups = scaled.view(len(scaled), self.qtype.groups(scaled.shape[1]), -1)
            extents = _extents(groups, self.qtype.symmetric)
            with torch.no_grad():
                noise = quantize(scaled, self.qtype).dequantize() - scaled
                noise = noise.view_as(groups) / extents.clamp_min(torch.finfo(noise.dtype).tiny)
            error = (noise * extents).view_as(scaled) / factors
            # the gradient of tr(E M E^T), M symmetric, is 2 E M; its size does not matter
            slope = error.detach() @ one.seen.data
            torch.autograd.backward([torch.sum(error * slope)])

    def _lost(self, readings: Sequence[Reading], scales: Tensor) -> float:
        """Return the mean square that rounding costs the results, summed over the readers."""
        return sum(self._lost_by(one, one.spread(scales)) for one in readings)

    def _lost_by(self, one: Reading, factors: Tensor) -> float:
        rounded = quantize(one.weight * factors, self.qtype).dequantize()
        if self.kind == "awq":
            error = rounded / factors - one.weight
            return float((error @ one.seen.data).mul_(error).sum())
        error = round_activations(one.seen.data / factors, None, None, 8) @ rounded.T
        return float((error - one.seen.data @ one.weight.T).square().sum()) / len(one.seen.data)


def _extents(groups: Tensor, symmetric: bool) -> Tensor:
    """Return what the steps of [out, groups, group] are proportional to, [out, groups, 1]."""
    if symmetric:
        return groups.abs().amax(-1, keepdim=True)
    high, low = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    return high.clamp_min(0) - low.clamp_max(0)


def _largest(readings: Sequence[Reading], sizes: Sequence[Tensor], count: int) -> Tensor:
    """Return the largest size of each scale's channels; the smallest positive one for zeros."""
    found = torch.zeros(count, dtype=torch.float64)
    for one, size in zip(readings, sizes, strict=True):
        mine = one.scales >= 0
        found.scatter_reduce_(0, one.scales[mine].cpu(), size[mine].double().cpu(), "amax")
    positive = found[found > 0]
    return torch.where(found > 0, found, positive.min() if len(positive) else 1.0)
