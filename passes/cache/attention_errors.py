"""What rounding keys and values does to the output of each attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...ir import Linear, PassError, Program, QuantizedLinear
from ...ir.cache import dequantize_cache, packs, quantize_cache
from ...ir.execute import Place
from ..context import PassContext
from ..outputs import observe_graph
from .entries import Entries, Entry
from .pareto import pareto_front
from .widths import CANDIDATES


@dataclass(frozen=True, slots=True)
class AttentionErrors:
    """Relative error of attention outputs for each block and pair of widths.

    Attributes:
        blocks: numbers of the cache entries.
        errors: ``|o' - o| / |o|`` with keys and values in the pair's widths, sums of squares over
            all tokens; float64 [blocks, pairs of ``CANDIDATES``].  Infinite for pairs of which
            codes do not fill whole bytes.
        tokens: how many were measured.
    """

    blocks: tuple[int, ...]
    errors: Tensor
    tokens: int

    def candidates(self) -> tuple[tuple[int, ...], ...]:
        """Return, for each block, the pairs that no other one dominates in bits and error."""
        bits = [float(keys + values) for keys, values in CANDIDATES]
        fronts = (pareto_front(bits, row.tolist()) for row in self.errors)
        fits = self.errors.isfinite().tolist()
        return tuple(
            tuple(pair for pair in front if own[pair])
            for front, own in zip(fronts, fits, strict=True)
        )


def attention_errors(
    program: Program, context: PassContext, graph: str, windows: Tensor
) -> AttentionErrors:
    """Measure every pair of widths for each block, nothing else being rounded.

    The output is what the linear behind attention reads.  Values are computed in float32.

    Args:
        program: a decoder with a cache that is not quantised.
        context: device and progress.
        graph: which graph.
        windows: int64 [windows, length].

    Raises:
        PassError: behind the keys and values of a block there is no linear to measure at.

    Source: KVTuner (arXiv 2502.04420), section 4: errors without accumulation.
    """
    device = None if context.device == "cpu" else torch.device(context.device)
    meter = _Meter(program, graph, Place(torch.float32, device))
    observe_graph(program, graph, windows, meter.observe, context, "rounding keys and values")
    return AttentionErrors(meter.blocks, meter.errors(), windows.numel())


def rounded(x: Tensor, bits: int) -> Tensor:
    """Return keys or values ``[..., width]`` as they are read back from codes."""
    return dequantize_cache(*quantize_cache(x, bits), x, bits)


@dataclass(frozen=True, slots=True, eq=False)
class _Region:
    """The calls from the cached keys and values of a block to the linear behind attention."""

    key: Entry
    value: Entry
    calls: tuple[fx.Node, ...]
    end: fx.Node

    @property
    def operands(self) -> set[fx.Node]:
        """What the calls read that is made outside, and the keys and values."""
        read = {source for call in self.calls for source in call.all_input_nodes}
        return read.difference(self.calls) | {self.key.join, self.value.join, self.end}

    def fits(self, pair: tuple[int, int]) -> bool:
        """Tell whether codes of a pair of widths fill whole bytes."""
        return all(
            packs(int(entry.newest.meta["val"].shape[-1]), bits)
            for entry, bits in zip((self.key, self.value), pair, strict=True)
        )

    def output(
        self, known: Callable[[fx.Node], Any], keys: Tensor, values: Tensor, place: Place
    ) -> Tensor:
        """Return what the linear reads for other keys and values, computed in a place."""
        made: dict[fx.Node, Any] = {self.key.join: keys, self.value.join: values}

        def value_of(node: fx.Node) -> Any:
            return made[node] if node in made else known(node)

        for call in self.calls:
            args = fx.node.map_arg(call.args, value_of)
            kwargs = fx.node.map_arg(call.kwargs, value_of)
            args, kwargs = fx.node.map_aggregate((args, kwargs), place.constant)
            assert callable(call.target)
            made[call] = call.target(*args, **kwargs)
        result: Tensor = made[self.end]
        return result


class _Meter:
    """Sums squared errors while a graph runs."""

    def __init__(self, program: Program, graph: str, place: Place) -> None:
        self.place = place
        pairs = Entries.of(program, graph).pairs()
        self.blocks = tuple(pairs)
        regions = [_region(*pair) for pair in pairs.values()]
        self.ends = {region.end: (row, region) for row, region in enumerate(regions)}
        self.last: dict[fx.Node, fx.Node] = {}
        for region in regions:
            self.last |= dict.fromkeys(region.operands, region.end)
        self.held: dict[fx.Node, Any] = {}
        sums = [
            [0.0 if region.fits(pair) else torch.inf for pair in CANDIDATES] for region in regions
        ]
        self.squares = torch.tensor(sums, dtype=torch.float64).view(-1, len(CANDIDATES))
        self.whole = torch.zeros(len(regions), dtype=torch.float64)

    def observe(self, node: fx.Node, value: Any) -> None:
        """Take the value of a node."""
        if node in self.last:
            self.held[node] = value
        if node not in self.ends:
            return
        row, region = self.ends[node]
        self._measure(row, region)
        for operand in region.operands:
            if self.last[operand] is node:
                del self.held[operand]

    def _measure(self, row: int, region: _Region) -> None:
        keys, values, expected = (
            self.held[node] for node in (region.key.join, region.value.join, region.end)
        )
        fitting = [(column, pair) for column, pair in enumerate(CANDIDATES) if region.fits(pair)]
        key_codes = {bits: rounded(keys, bits) for bits in {pair[0] for _, pair in fitting}}
        value_codes = {bits: rounded(values, bits) for bits in {pair[1] for _, pair in fitting}}
        self.whole[row] += expected.double().square().sum().cpu()
        for column, (key_bits, value_bits) in fitting:
            given = key_codes[key_bits], value_codes[value_bits]
            found = region.output(self.held.__getitem__, *given, self.place)
            self.squares[row, column] += (found - expected).double().square().sum().cpu()

    def errors(self) -> Tensor:
        """Return the relative errors of what was seen so far."""
        return (self.squares / self.whole.clamp_min(1e-300)[:, None]).sqrt()


def _region(key: Entry, value: Entry) -> _Region:
    """Follow keys and values to the first linear.

    Raises:
        PassError: there is none, or several that read different things.
    """
    reached: dict[fx.Node, None] = {}
    ends: dict[fx.Node, None] = {}
    waiting = [key.join, value.join]
    while waiting:
        node = waiting.pop()
        if any(Linear.match(user) or QuantizedLinear.match(user) for user in node.users):
            ends[node] = None
            continue
        new = [user for user in node.users if _is_made(user) and user not in reached]
        reached |= dict.fromkeys(new)
        waiting += new
    if len(ends) != 1:
        raise PassError(
            f"quantize-cache: attention {key.number} is read by {len(ends)} linears, so that its "
            "output is not clear",
            remedy="give the widths with key-bits=, value-bits= or blocks=, without target-bits=",
        )
    (end,) = ends
    behind = {end}
    for node in reversed(end.graph.nodes):
        if node in behind:
            behind.update(source for source in node.all_input_nodes if source in reached)
    calls = tuple(node for node in end.graph.nodes if node in behind and node in reached)
    return _Region(key, value, calls, end)


def _is_made(node: fx.Node) -> bool:
    """Tell whether a node computes tensors."""
    return node.op == "call_function" and isinstance(node.meta["val"], Tensor | tuple | list)
