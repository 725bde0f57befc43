"""A program whose cache entries are rounded in any widths, for measuring many of them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from ...ir import Program, insert_call
from ..context import PassContext
from ..data import TokenWindows
from ..fidelity import Reference
from ..progress import SilentProgress
from .entries import Entries, Entry
from .widths import Pair


class Simulation:
    """Measures what widths of the cache cost on calibration windows.

    New keys and values go through codes before they are joined with the past, which stays in
    floating point: with an empty past that is what a quantised cache computes.

    Args:
        program: a decoder with a cache that is not quantised; left as it is.
        context: device.
        graph: which graph.
        windows: int64 [windows, length].
    """

    def __init__(self, program: Program, context: PassContext, graph: str, windows: Tensor) -> None:
        self.program = program.editable()
        text = TokenWindows.of(windows, "calibration")
        quiet = replace(context.fresh(), check_text=text, progress=SilentProgress())
        self._reference = Reference(program, quiet)
        pairs = Entries.of(self.program, graph).pairs()
        self._rounds = {number: tuple(map(_Rounding, entries)) for number, entries in pairs.items()}

    def kl(self, table: Mapping[int, Pair]) -> float:
        """Return KL(not rounded || rounded) in nats per token.

        Args:
            table: widths by block; blocks that it leaves out are not rounded.
        """
        for number, parts in self._rounds.items():
            for part, bits in zip(parts, table.get(number, (None, None)), strict=True):
                part.set(bits)
        kl = self._reference.measure(self.program).kl
        assert kl is not None
        return kl


class _Rounding:
    """Calls that round one entry, and may be left out."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        ops, read = torch.ops.modelathe, entry.join
        self.code = _inserted(read, ops.quantize_cache.default, entry.newest, 8)
        parts = [_inserted(read, operator.getitem, self.code, index) for index in range(3)]
        self.value = _inserted(read, ops.dequantize_cache.default, *parts, entry.newest, 8)

    def set(self, bits: int | None) -> None:
        """Round to ``bits``, or not at all."""
        if bits is not None:
            self.code.args = (self.entry.newest, bits)
            self.value.args = (*self.value.args[:-1], bits)
        used = self.entry.newest if bits is None else self.value
        parts = [self.entry.past, used]
        self.entry.join.args = (parts, *self.entry.join.args[1:])


def _inserted(join: fx.Node, target: object, *args: object) -> fx.Node:
    return insert_call(join.graph, target, args, before=join, like=join)
