"""What rounding keys and values does to the output of each attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...ir import Linear, PassError, Program, QuantizedLinear, fingerprint
from ...ir.cache import dequantize_cache, quantize_cache
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
            all tokens; float64 [blocks, pairs of ``CANDIDATES``].
        tokens: how many were measured.
        fingerprint: of the program that was measured.
    """

    blocks: tuple[int, ...]
    errors: Tensor
    tokens: int
    fingerprint: str

    def candidates(self) -> tuple[tuple[int, ...], ...]:
        """Return, for each block, the pairs that no other one dominates in bits and error."""
        bits = [float(keys + values) for keys, values in CANDIDATES]
        return tuple(pareto_front(bits, row.tolist()) for row in self.errors)


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
    meter = _Meter(program, graph)
    observe_graph(program, graph, windows, meter.observe, context, "rounding keys and values")
    return AttentionErrors(meter.blocks, meter.errors(), windows.numel(), fingerprint(program))


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

    def output(self, known: Callable[[fx.Node], Any], keys: Tensor, values: Tensor) -> Tensor:
        """Return what the linear reads for other keys and values."""
        made: dict[fx.Node, Any] = {self.key.join: keys, self.value.join: values}

        def value_of(node: fx.Node) -> Any:
            return made[node] if node in made else known(node)

        for call in self.calls:
            args = fx.node.map_arg(call.args, value_of)
            kwargs = fx.node.map_arg(call.kwargs, value_of)
            assert callable(call.target)
            made[call] = call.target(*args, **kwargs)
        result: Tensor = made[self.end]
        return result


class _Meter:
    """Sums squared errors while a graph runs."""

    def __init__(self, program: Program, graph: str) -> None:
        pairs = Entries.of(program, graph).pairs()
        self.blocks = tuple(pairs)
        regions = [_region(*pair) for pair in pairs.values()]
        self.ends = {region.end: (row, region) for row, region in enumerate(regions)}
        self.last: dict[fx.Node, fx.Node] = {}
        for region in regions:
            self.last |= dict.fromkeys(region.operands, region.end)
        self.held: dict[fx.Node, Any] = {}
        self.squares = torch.zeros(len(regions), len(CANDIDATES), dtype=torch.float64)
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
        parts = {
            (part, bits): rounded(x, bits)
            for part, x in (("key", keys), ("value", values))
            for bits in {bits for pair in CANDIDATES for bits in pair}
        }
        self.whole[row] += expected.double().square().sum().cpu()
        for column, (key_bits, value_bits) in enumerate(CANDIDATES):
            given = parts["key", key_bits], parts["value", value_bits]
            found = region.output(self.held.__getitem__, *given)
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
