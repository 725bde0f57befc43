"""Quantised weights as weights of a program, and the exact claims about them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir import (
    SCRATCH,
    ComputedWeight,
    PassError,
    Program,
    QuantizedEmbedding,
    QuantizedLinear,
    Weight,
    content_hash,
)
from ...ir.quant import Clip, QuantizedTensor, QuantType, encode, packed_width, quantize, wider
from .outliers import Outliers, Solved


@dataclass(frozen=True, slots=True)
class Stored:
    """The parts of a quantised weight, to be made when one of them is read.

    Attributes:
        qtype: its number type.
        in_features: numbers in a row.
        codes, scales, zeros: as in ``QuantizedTensor``.
    """

    qtype: QuantType
    in_features: int
    codes: Weight
    scales: Weight
    zeros: Weight | None

    @classmethod
    def of(cls, program: Program, call: QuantizedLinear | QuantizedEmbedding) -> Stored:
        """Return the weight that a call of the program reads."""
        qtype = QuantType(call.bits, call.group_size, symmetric=call.zeros is None)
        zeros = None if call.zeros is None else program.weight(call.zeros)
        codes, scales = program.weight(call.codes), program.weight(call.scales)
        return cls(qtype, call.in_features, codes, scales, zeros)

    def load(self) -> QuantizedTensor:
        """Return the tensors."""
        zeros = None if self.zeros is None else self.zeros.load()
        codes, scales = self.codes.load(), self.scales.load()
        return QuantizedTensor(self.qtype, self.in_features, codes, scales, zeros)


def check_groups(name: str, weight: Weight, qtype: QuantType, path: str | None = None) -> None:
    """Check that the rows of a weight fall into whole groups.

    Args:
        name: of the weight, for the message.
        weight: [out, in].
        qtype: says how long a group is.
        path: of a module that reads it, where the option ``ignore`` can leave that alone.

    Raises:
        PassError: they do not.
    """
    width = weight.shape[1]
    if qtype.divides(width):
        return
    leave = "" if path is None else f'; or leave it alone with ignore="{path}"'
    raise PassError(
        f"@{name}: {width} wide, which group-size={qtype.group_size} does not divide",
        remedy=f"group-size=-1 (one group per row) is always legal{leave}",
    )


def store_rounded(name: str, weight: Weight, qtype: QuantType, clip: Clip) -> Stored:
    """Return ``weight [out, in]`` rounded to the nearest numbers of its grid, not yet evaluated.

    One evaluation serves all parts: they are slices of one row of bytes, the scales first.
    """
    out, width = weight.shape
    groups, unit = qtype.groups(width), weight.dtype.itemsize

    def evaluate(tensor: Tensor) -> Tensor:
        try:
            rounded = quantize(tensor, qtype, clip)
        except ValueError as error:
            raise PassError(f"@{name}: {error}", remedy="mend or replace the weight") from error
        zeros = () if rounded.zeros is None else (rounded.zeros,)
        parts = (rounded.scales, rounded.codes, *zeros)
        return torch.cat([part.contiguous().view(torch.uint8).view(-1) for part in parts])

    size = qtype.nbytes(out, width, weight.dtype)
    whole = ComputedWeight(f"quantize {qtype} {clip}", (weight,), (size,), torch.uint8, evaluate)
    first = out * groups * unit
    second = first + out * packed_width(width, qtype.bits)
    return Stored(
        qtype,
        width,
        codes=_part(whole, first, (out, packed_width(width, qtype.bits)), torch.uint8),
        scales=_part(whole, 0, (out, groups), weight.dtype),
        zeros=None
        if qtype.symmetric
        else _part(whole, second, (out, packed_width(groups, qtype.bits)), torch.uint8),
    )


def _part(whole: Weight, start: int, shape: tuple[int, int], dtype: torch.dtype) -> Weight:
    stop = start + shape[0] * shape[1] * dtype.itemsize
    return ComputedWeight(
        f"bytes from {start}",
        (whole,),
        shape,
        dtype,
        lambda data: data[start:stop].view(dtype).view(shape),
        keep=False,  # a view of what is kept
    )


def store(weight: Weight, solved: Solved) -> Stored:
    """Return a quantised weight that is computed already as weights of a program.

    Args:
        weight: the one that it takes the place of.
        solved: its codes, and its outliers, which are not stored here.
    """
    tensor = solved.codes
    codes = SCRATCH.keep(chosen_print(weight, solved), tensor.codes.contiguous())
    zeros = None if tensor.zeros is None else held(tensor.zeros)
    return Stored(tensor.qtype, tensor.in_features, codes, held(tensor.scales), zeros)


def chosen_print(weight: Weight, solved: Solved) -> str:
    """Return the fingerprint of codes that text has chosen.

    It also tells which weight they are of, and what they and all that is stored beside them stand
    for: what is right for them cannot be seen from the weight.
    """
    stands_for = f"{weight.fingerprint} {content_hash(solved.dequantize())}"
    meant = hashlib.sha256(stands_for.encode()).hexdigest()[:32]
    return f"tensor:{content_hash(solved.codes.codes)}:{meant}"


def held(value: Tensor) -> Weight:
    """Return a weight of a tensor that is computed already; its content is its fingerprint."""
    value = value.cpu().contiguous()
    return SCRATCH.keep(f"tensor:{content_hash(value)}", value)


class Dequantized(Weight):
    """What a quantised weight stands for, made anew whenever it is read.

    Args:
        weight: the one that it takes the place of.
        qtype: its number type.
        load: reads its codes, and its outliers.
    """

    def __init__(self, weight: Weight, qtype: QuantType, load: Callable[[], Solved]) -> None:
        self.shape, self.dtype, self._load = weight.shape, weight.dtype, load
        self._fingerprint = f"dequantized:{weight.fingerprint}:{qtype}"

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def load(self, dtype: torch.dtype | None = None) -> Tensor:
        return self._load().dequantize(dtype or self.dtype)


def check_chosen(name: str, weight: Weight, stored: Stored, outliers: Outliers | None) -> None:
    """Check that codes which text has chosen stand for what was computed when they were chosen.

    They need not be the nearest, nor near: the weight may move by more than its size where what it
    reads has next to no power.

    Raises:
        PassError: they do not.
    """
    if stored.codes.fingerprint != chosen_print(weight, Solved(stored.load(), outliers)):
        raise PassError(f"@{name}: the stored codes do not stand for the numbers computed")


def quality(weight: Tensor, stored: QuantizedTensor, outliers: Outliers | None = None) -> float:
    """Return signal over error, ``sum w**2 / sum (w - w')**2``, in dB; inf where they are equal.

    Args:
        weight: w, [out, in].
        stored: w', but for its outliers.
        outliers: added to it.
    """
    signal = error = 0.0
    for rows, tile in stored.tiles():
        given = weight[rows].to(wider(weight.dtype))
        signal += given.square().sum().item()
        restored = tile.dequantize(given.dtype)
        if outliers is not None:
            outliers.add_to(restored, rows)
        error += (restored - given).square().sum().item()
    return 10 * math.log10(signal / error) if signal and error else math.inf


def check_rounded(name: str, weight: Tensor, stored: QuantizedTensor, covering: bool) -> None:
    """Check that ``stored`` is ``weight`` rounded to the nearest numbers of the stored grid.

    Dequantising what is stored gives bit for bit what rounding to the grid gives, every number
    inside the range of its group is within half a step, and where it covers the weight every one.

    Raises:
        PassError: naming the first number that is not.
    """
    wide = wider(weight.dtype)
    # scale, w / scale, scale * level, the difference: at most 2**bits steps, each rounded
    half = 0.5 + 2 * 2**stored.qtype.bits * torch.finfo(wide).eps
    for rows, tile in stored.tiles():
        given, restored = weight[rows].to(wide), tile.dequantize(wide)
        grid = tile.grid
        scales = grid.scales.to(wide).unsqueeze(-1)
        zeros = grid.zero_points(wide)
        levels = encode(given, grid).to(wide).view(*grid.scales.shape, -1) - zeros
        if not restored.equal((levels * scales).view(restored.shape)):
            raise PassError(f"@{name}: the stored codes do not stand for the numbers computed")
        ends = torch.stack([-zeros * scales, (stored.qtype.largest_code - zeros) * scales])
        grouped = given.reshape(levels.shape)
        nearest = grouped if covering else grouped.clamp(ends.amin(0), ends.amax(0))
        steps = (restored.view(levels.shape) - nearest).abs() / scales.abs()
        if not bool((steps <= half).all()):
            worst = steps.nan_to_num(torch.inf).argmax().item()
            row, column = divmod(int(worst), weight.shape[1])
            moved = f"{float(steps.view(-1)[int(worst)]):.3g} steps, more than half a step"
            raise PassError(f"@{name}: [{rows.start + row}, {column}] moved by {moved}")
