"""Our quantised weights in the layout that ONNX Runtime's kernels read.

``MatMulNBits`` and ``GatherBlockQuantized`` take 2, 4 and 8 bits in blocks of 16, 32, 64, ... along
the input axis, low bits first, a scale and a zero point for each block, zero points packed like
codes.  That is our own layout whenever a group is such a block; anything else is brought to it when
it is written:

- 3 bits go into 4; so do 2 bits in groups of 16, for which the runtime has no fast kernel
  (measured: 400 times slower).
- a group of several blocks repeats its scale; whole rows are cut into blocks of up to 128 (larger
  ones are no faster, and coarser where activations are rounded per block).
- a group that no number of blocks fills is filled up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.quant import QuantType, pack, packed_width, row_tiles, unpack

SMALLEST, LARGEST_OF_ROW = 16, 128
_FAST_2_BITS = range(32, 129)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a weight ``[n, k]`` of a type is stored.

    Attributes:
        qtype: the type of the codes.
        k: numbers in a row.
        bits: stored bits of a code.
        block: numbers that share a stored scale.
        filled: stored numbers of a group, a multiple of ``block``.
    """

    qtype: QuantType
    k: int
    bits: int
    block: int
    filled: int

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return self.qtype.groups(self.k)

    @property
    def group(self) -> int:
        """Numbers in a group."""
        return self.k // self.groups

    @property
    def spread(self) -> bool:
        """Whether there are gaps between groups, so that activations need them, too."""
        return self.groups > 1 and self.filled != self.group

    @property
    def width(self) -> int:
        """Numbers in a row as the runtime sees it, without what fills up the end."""
        return self.groups * self.filled if self.spread else self.k

    @property
    def blocks(self) -> int:
        """Blocks in a row."""
        return self.groups * self.filled // self.block

    @property
    def bytes_per_block(self) -> int:
        """Bytes that the codes of a block take."""
        return self.block * self.bits // 8

    def codes(self, packed: Tensor) -> Tensor:
        """Return our packed codes ``[n, ...]`` as ``uint8 [n, blocks * bytes_per_block]``."""
        if self.bits == self.qtype.bits and self.filled == self.group:
            return packed
        rows = packed.shape[0]
        width = self.blocks * self.bytes_per_block
        result = torch.empty((rows, width), dtype=torch.uint8)
        for run in row_tiles(rows, self.groups * self.filled):
            codes = unpack(packed[run], self.qtype.bits, self.k) + self._lift
            grouped = codes.view(codes.shape[0], self.groups, self.group)
            filled = torch.nn.functional.pad(grouped, (0, self.filled - self.group))
            result[run] = pack(filled.reshape(codes.shape[0], -1), self.bits)
        return result

    def scales(self, scales: Tensor) -> Tensor:
        """Return scales ``[n, groups]`` as ``[n, blocks]``."""
        return scales.repeat_interleave(self.filled // self.block, dim=1)

    def zeros(self, packed: Tensor) -> Tensor:
        """Return our packed zero points as ``uint8 [n, ceil(blocks * bits / 8)]``."""
        if self.bits == self.qtype.bits and self.filled == self.block:
            return packed
        zeros = unpack(packed, self.qtype.bits, self.groups)
        return pack(self.scales(zeros), self.bits)

    @property
    def zeros_width(self) -> int:
        """Bytes that the zero points of a row take."""
        return packed_width(self.blocks, self.bits)

    @property
    def _lift(self) -> int:
        """What brings a symmetric code's middle to that of the stored width."""
        return (1 << (self.bits - 1)) - self.qtype.middle if self.qtype.symmetric else 0


def layout(qtype: QuantType, k: int) -> Layout:
    """Return how a weight of ``k`` numbers a row is stored.

    >>> layout(QuantType(4, 32, True), 96).block
    32
    >>> layout(QuantType(8, -1, True), 384).block
    128
    """
    group = k // qtype.groups(k)
    block = _block_of_row(k) if group == k else _block_of_group(group)
    if qtype.bits == 2 and block > _FAST_2_BITS[-1]:
        block = _FAST_2_BITS[-1]
    slow = qtype.bits == 2 and block not in _FAST_2_BITS
    bits = 4 if slow or qtype.bits == 3 else qtype.bits
    return Layout(qtype, k, bits, block, -(-group // block) * block)


def _block_of_row(k: int) -> int:
    """Return the block, of 16 to 128, that stores the fewest numbers; the largest of those."""
    blocks = (SMALLEST << shift for shift in range(4))
    return max(blocks, key=lambda block: (-(-(-k // block) * block), block))


def _block_of_group(group: int) -> int:
    """Return the largest power of two that divides a group, filled up to 16s if need be."""
    filled = group if group & -group >= SMALLEST else -(-group // SMALLEST) * SMALLEST
    return filled & -filled
