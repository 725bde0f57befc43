"""Quantised weights: how codes are packed, which grid they index, and what they stand for.

A weight ``W: [out, in]`` is cut along its rows into groups of ``group_size`` neighbours, each with
one scale and one zero point:  ``W[i, j] ~ scale[i, g] * (code[i, j] - zero[i, g])``, g = j's group.
Codes are unsigned.  A symmetric weight stores no zero points: all of them are ``2**(bits - 1)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Clip = Literal["none", "weight", "activation"]

WIDTHS = (2, 3, 4, 8)
_TILE = 1 << 19  # numbers handled at once: temporaries stay in cache, and memory bounded
_SHRINKS = 80  # clip="weight" tries the whole range, 99 % of it, ... 21 % of it


@dataclass(frozen=True, slots=True)
class QuantType:
    """The number type of a quantised weight.

    Attributes:
        bits: width of a code: 2, 3, 4 or 8.
        group_size: neighbours along the input axis that share a scale; -1: the whole row.
        symmetric: no zero points are stored; the code ``2**(bits - 1)`` is zero everywhere.

    >>> QuantType(4, 32, symmetric=False).groups(96)
    3
    >>> QuantType(4, 32, symmetric=False).nbytes(1, 96)  # 48 of codes, 12 of scales, 2 of zeros
    62
    """

    bits: int
    group_size: int
    symmetric: bool

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise ValueError(f"bits is 2, 3, 4 or 8, got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(
                f"group_size is positive, or -1 for one group per row, got {self.group_size}"
            )

    @property
    def largest_code(self) -> int:
        """The largest code, ``2**bits - 1``."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric weight, ``2**(bits - 1)``."""
        return 1 << (self.bits - 1)

    def divides(self, in_features: int) -> bool:
        """Whether a row of ``in_features`` falls into whole groups."""
        return self.group_size == -1 or in_features % self.group_size == 0

    def groups(self, in_features: int) -> int:
        """Groups in a row.

        Raises:
            ValueError: the row does not fall into whole groups.
        """
        if not self.divides(in_features):
            raise ValueError(f"group_size {self.group_size} does not divide {in_features}")
        return 1 if self.group_size == -1 else in_features // self.group_size

    def nbytes(
        self, out_features: int, in_features: int, scales: torch.dtype = torch.float32
    ) -> int:
        """Bytes of the codes, scales and zero points of a ``[out, in]`` weight, as stored."""
        groups = self.groups(in_features)
        row = packed_width(in_features, self.bits) + groups * scales.itemsize
        return out_features * (row + (0 if self.symmetric else packed_width(groups, self.bits)))

    def __str__(self) -> str:
        group = "row" if self.group_size == -1 else f"group of {self.group_size}"
        return f"{self.bits} bits per {group}{', symmetric' if self.symmetric else ''}"


@dataclass(frozen=True, slots=True)
class Grid:
    """The representable numbers of each group.

    Attributes:
        scales: ``[out, groups]``, the step, in the dtype in which it is stored; never zero;
            negative in those groups of a symmetric weight whose largest number is positive.
        zeros: the codes of zero, uint8 ``[out, groups]``; None: symmetric.
    """

    qtype: QuantType
    scales: Tensor
    zeros: Tensor | None

    def rows(self, rows: slice) -> Grid:
        """The grid of some rows, a view."""
        return Grid(self.qtype, self.scales[rows], None if self.zeros is None else self.zeros[rows])

    def zero_points(self, dtype: torch.dtype) -> Tensor | float:
        """The code of zero: ``[out, groups, 1]``, or one number for all."""
        return (
            float(self.qtype.middle) if self.zeros is None else self.zeros.to(dtype).unsqueeze(-1)
        )


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight ``[out, in_features]`` as it is stored.

    Attributes:
        codes: uint8 ``[out, ceil(in_features * bits / 8)]``, packed along the input axis.
        scales: ``[out, groups]``.
        zeros: uint8 ``[out, ceil(groups * bits / 8)]``, packed as the codes are; None: symmetric.
    """

    qtype: QuantType
    in_features: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    @classmethod
    def from_codes(cls, codes: Tensor, grid: Grid) -> QuantizedTensor:
        """Pack unsigned ``codes [out, in]`` of a grid."""
        bits = grid.qtype.bits
        zeros = None if grid.zeros is None else pack(grid.zeros, bits)
        return cls(grid.qtype, codes.shape[1], pack(codes, bits), grid.scales, zeros)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the weight that the codes stand for."""
        return self.codes.shape[0], self.in_features

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.qtype.nbytes(*self.shape, self.scales.dtype)

    @property
    def grid(self) -> Grid:
        """Scales, and zero points unpacked."""
        if self.zeros is None:
            return Grid(self.qtype, self.scales, None)
        zeros = unpack(self.zeros, self.qtype.bits, self.scales.shape[1])
        return Grid(self.qtype, self.scales, zeros)

    def rows(self, rows: slice | Tensor) -> QuantizedTensor:
        """Some rows: a slice of them, or those with the given indices ``[count]``."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return QuantizedTensor(
            self.qtype, self.in_features, self.codes[rows], self.scales[rows], zeros
        )

    def tiles(self) -> Iterator[tuple[slice, QuantizedTensor]]:
        """Runs of rows that are small enough to be unpacked."""
        for rows in row_tiles(*self.shape):
            yield rows, self.rows(rows)

    def levels(self, dtype: torch.dtype) -> Tensor:
        """``code - zero``, a whole number, as ``[out, groups, group]`` of ``dtype``; not tiled."""
        codes = unpack(self.codes, self.qtype.bits, self.in_features).to(dtype)
        grid = self.grid
        return codes.reshape(*grid.scales.shape, -1).sub_(grid.zero_points(dtype))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight ``[out, in]`` in ``dtype`` (default: that of the scales).

        Products are made in float32 or wider, and rounded to ``dtype`` once.
        """
        dtype = dtype or self.scales.dtype
        wide = wider(self.scales.dtype)
        result = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for rows, tile in self.tiles():
            product = tile.levels(wide).mul_(tile.scales.to(wide).unsqueeze(-1))
            result[rows] = product.view(tile.shape)
        return result


def quantize(weight: Tensor, qtype: QuantType, clip: Clip = "none") -> QuantizedTensor:
    """Round ``weight [out, in]`` to the nearest numbers of the grid of ``choose_grid``.

    With ``clip="none"`` every number moves by at most half a step, ``|scale| / 2``, whatever dtype
    the scales are stored in (but for the rounding of the comparison itself).

    Raises:
        ValueError: not a floating matrix, nan or inf, or a group size that does not divide.
    """
    grid = choose_grid(weight, qtype, clip)
    out, width = weight.shape
    shape = out, packed_width(width, qtype.bits)
    codes = torch.empty(shape, dtype=torch.uint8, device=weight.device)
    for rows in row_tiles(out, width):
        codes[rows] = pack(encode(weight[rows], grid.rows(rows)), qtype.bits)
    zeros = None if grid.zeros is None else pack(grid.zeros, qtype.bits)
    return QuantizedTensor(qtype, width, codes, grid.scales, zeros)


def choose_grid(
    weight: Tensor, qtype: QuantType, clip: Clip = "none", power: Tensor | None = None
) -> Grid:
    """The grid that covers each group of ``weight [out, in]``, or a narrower one that fits better.

    With lo = min(group, 0), hi = max(group, 0), n = 2**bits - 1 and h = 2**(bits - 1):

    - asymmetric: scale = (hi - lo) / n, zero = round(-lo / scale).
    - symmetric: levels -h..h-1, so one side reaches further; the scale takes the sign that turns
      it to the larger extreme: |scale| = max(larger / h, smaller / (h - 1/2)).  A half step is
      never exceeded, as it would be by the other extreme if |scale| were larger / h alone.
    - scales are rounded *up* to the weight's dtype, and codes are chosen after that.
    - ``clip="weight"`` multiplies the scale by that factor of 1, 0.99, ..., 0.21 which has the
      least sum of squared errors over the group, the first of equals; so it is never worse than 1.
      ``clip="activation"`` weighs each error by ``power [in]``, the mean square of what it is
      multiplied with.
    - a group of zeros has scale 1.

    Source: the min/max grid and the 80 steps are those of QuantEase (arXiv 2309.01885, its
    method/quant.py), which minimises |error|**2.4; the square takes an eighth of the time.
    """
    out, width = _matrix(weight)
    grouped = weight.reshape(out, qtype.groups(width), -1)
    scales = torch.empty(grouped.shape[:2], dtype=weight.dtype, device=weight.device)
    zeros = None if qtype.symmetric else torch.empty_like(scales, dtype=torch.uint8)
    grid = Grid(qtype, scales, zeros)
    for rows in row_tiles(out, width):
        tile = grid.rows(rows)
        _cover(grouped[rows], tile)
        if clip == "weight":
            _shrink(grouped[rows], tile, None)
        elif clip == "activation":
            assert power is not None
            _shrink(grouped[rows], tile, power.view(grouped.shape[1:]))
    return grid


def encode(weight: Tensor, grid: Grid) -> Tensor:
    """The codes of the grid's numbers nearest to ``weight [out, in]``: uint8 ``[out, in]``.

    Not tiled: memory is a few times that of ``weight``.
    """
    wide = wider(weight.dtype)
    grouped = weight.to(wide).reshape(*grid.scales.shape, -1)
    steps = grouped / grid.scales.to(wide).unsqueeze(-1)
    codes = steps.round_().add_(grid.zero_points(wide)).clamp_(0, grid.qtype.largest_code)
    return codes.to(torch.uint8).reshape(weight.shape)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned ``codes [rows, count]`` into bytes ``[rows, ceil(count * bits / 8)]``.

    Code j takes the bits from ``j * bits`` of its row, low bits first, so that two 4-bit codes
    lie low nibble first; the last byte is filled with zero bits.

    >>> pack(torch.tensor([[1, 2, 3]]), 4).tolist()
    [[33, 3]]
    """
    per, width, shifts = _words(bits, codes.device)
    rows, count = codes.shape
    result = torch.empty((rows, packed_width(count, bits)), dtype=torch.uint8, device=codes.device)
    for run in row_tiles(rows, count):
        padded = torch.nn.functional.pad(codes[run].to(shifts.dtype), (0, -count % per))
        words = (padded.view(padded.shape[0], -1, per) << shifts).sum(-1, dtype=shifts.dtype)
        whole = words.view(torch.uint8).view(*words.shape, -1)[..., :width]
        result[run] = whole.reshape(words.shape[0], -1)[:, : result.shape[1]]
    return result


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The uint8 codes ``[rows, count]`` that ``pack`` packed; not tiled.

    Raises:
        ValueError: ``packed`` has another width than ``count`` codes take.
    """
    if packed.shape[1] != packed_width(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_width(count, bits)} bytes,"
            f" got {packed.shape[1]}"
        )
    _, width, shifts = _words(bits, packed.device)
    rows = packed.shape[0]
    whole = torch.nn.functional.pad(packed, (0, -packed.shape[1] % width)).view(rows, -1, width)
    filled = torch.nn.functional.pad(whole, (0, shifts.dtype.itemsize - width)).contiguous()
    words = filled.view(shifts.dtype)
    codes = ((words >> shifts) & ((1 << bits) - 1)).to(torch.uint8)
    return codes.reshape(rows, -1)[:, :count]


def packed_width(count: int, bits: int) -> int:
    """Bytes that ``count`` packed codes take."""
    return (count * bits + 7) // 8


def row_tiles(rows: int, width: int) -> Iterator[slice]:
    """Cut ``rows`` of ``width`` numbers into runs of bounded size, at least one row each."""
    step = max(1, _TILE // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of ``dtype`` are multiplied: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _words(bits: int, device: torch.device) -> tuple[int, int, Tensor]:
    """Codes per word, bytes per word, and each code's shift in the word's dtype.

    Widths that divide a byte use single bytes; 3 bits use 8 codes, 3 bytes of an int64.
    """
    if 8 % bits == 0:
        return 8 // bits, 1, torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
    return 8, bits, torch.arange(0, 8 * bits, bits, dtype=torch.int64, device=device)


def _matrix(weight: Tensor) -> tuple[int, int]:
    """Rows and columns of a weight that can be quantised."""
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        kind = f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
        raise ValueError(f"a matrix of floating-point numbers is expected, got {kind}")
    return weight.shape[0], weight.shape[1]


def _cover(grouped: Tensor, grid: Grid) -> None:
    """Fill ``grid`` with the narrowest numbers that cover ``grouped [out, groups, group]``."""
    lowest, highest = grouped.aminmax(dim=-1)
    low, high = lowest.double().clamp_(max=0), highest.double().clamp_(min=0)
    extent = high - low
    if not bool(extent.isfinite().all()):
        raise ValueError("the weight holds nan or inf")
    if grid.zeros is not None:
        step = _round_up(extent / grid.qtype.largest_code, grid.scales.dtype)
        grid.scales.copy_(torch.where(extent == 0, 1, step))
        grid.zeros.copy_((-low / grid.scales).round_())
        return
    half = float(grid.qtype.middle)
    larger, smaller = torch.maximum(high, -low), torch.minimum(high, -low)
    size = _round_up(torch.maximum(larger / half, smaller / (half - 0.5)), grid.scales.dtype)
    signed = torch.where(high > -low, -size, size)
    grid.scales.copy_(torch.where(extent == 0, 1, signed))


def _round_up(step: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest numbers of ``dtype`` that are at least ``step``, which is not negative."""
    near = step.to(dtype)
    return torch.where(near < step, torch.nextafter(near, near.new_tensor(torch.inf)), near)


def _shrink(grouped: Tensor, grid: Grid, power: Tensor | None) -> None:
    """Replace the scales of ``grid`` by those of the shrunk range with the least squared error."""
    wide = wider(grouped.dtype)
    grouped = grouped.to(wide)
    zeros = grid.zero_points(wide)
    whole = grid.scales.to(wide, copy=True)
    best = torch.full_like(whole, torch.inf)
    work = torch.empty_like(grouped)
    for step in range(_SHRINKS):
        # round up again: a float16 scale must not vanish
        scales = _round_up(whole.abs() * (1 - step / 100), grid.scales.dtype).copysign(grid.scales)
        wide_scales = scales.to(wide).unsqueeze(-1)
        torch.div(grouped, wide_scales, out=work).round_()
        work.add_(zeros).clamp_(0, grid.qtype.largest_code).sub_(zeros)
        work.mul_(wide_scales).sub_(grouped).square_()
        error = work.sum(-1) if power is None else work.mul_(power).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        grid.scales.copy_(torch.where(better, scales, grid.scales))
