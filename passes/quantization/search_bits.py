"""Widths for linears by what rounding them costs, to meet a size or a divergence."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...ir import PassError, Program
from ...ir.quant import QuantType
from ..base import Fidelity, Pass, PassResult, Remark
from ..context import PassContext, reads_tokens
from ..progress import Advance
from .bit_search import Forecast, Goal, Order, Search, Table
from .quantize_weights import QuantizeWeights
from .sensitivity import Cost, RoundedUnits, has_logits, second_order
from .store import check_groups
from .units import Unit, check_units, find_units, single_linears
from .widths import Chosen, check_only_marked, mean_bits, put_widths


@dataclass(frozen=True, kw_only=True)
class SearchBits(Pass):
    """Choose a width for each linear, or each block, so that the model changes least at a size.

    The widths are marks that ``quantize-weights`` without ``bits=`` obeys; which linears are meant,
    and what is not touched, is as ``assign-bits`` says.  A unit is a linear of a block, or all of
    the block; those that share weights are one.

    1. What unit u costs alone in b bits, to second order, with dW: [out, in] the rounding error, x
       what the linear reads and g the gradient of log p(y) at what it writes, for y drawn from the
       model: ``H_u(b) = 1/2 sum over o, i of E[g_o^2] E[x_i^2] dW_oi^2``, the diagonal of the
       Fisher matrix; scaled to the measured KL of unit u alone in the narrowest width.
    2. What two units cost together beyond that, measured in the narrowest width:
       ``I_uv = KL(u, v) - KL(u) - KL(v)``; neighbours first, then those with the largest costs.
    3. A chain of tables: from the widest on, the unit that goes down next is the one with the
       least ``H_u + sum of I_uv``, for what it saves: over the units v that went before, or with
       ``order=static`` over all others.
    4. Bisection along the chain: against the size, or against measured KL.
    5. Tables near by, in the order of what they are expected to cost, and the uniform widths are
       measured; the best one that was measured is chosen.

    KL(not rounded || rounded) is in nats per token of calibration text; for a model without logits,
    one minus the mean cosine of its outputs stands for it.  Weights are rounded to nearest here,
    whatever method rounds them later, on the grid that ``group-size`` and ``symmetric`` say.  With
    blocks as units a mean of exactly b bits is seldom better than b bits everywhere: a bit less
    costs about five times what a bit more saves, and blocks do not differ that much.

    Refuses, as an error: what ``assign-bits`` refuses; a model that reads no tokens; a target that
    even the narrowest, or the widest, width cannot meet; ``target-kl`` without logits; a
    ``group-size`` that does not divide a row.

    Source: a reconstruction of "Augmenting Hessians with inter-layer dependencies" (arXiv
    2306.04879) from its abstract: second-order scores, augmented by dependencies between layers,
    order the layers for a bisection.  The terms above and step 5 are ours.

    Attributes:
        target_bits: mean width at most, scales not counted.
        target_kl: measured KL at most; then the fewest bytes.
        target_bytes: at most, codes, scales and zero points of the blocks' linears.
        widths: to choose from.
        unit: what shares a width: each linear by itself, or all linears of a block.
        group_size: neighbours that share a scale, as quantize-weights will have it; -1: all.
        symmetric: without zero points, as quantize-weights will have it.
        tokens: of the calibration text that costs are measured on, whole windows.
        pairs: of units that are measured together, at most.
        tables: near the best one that are measured.
        order: of the chain: greedy or static.
    """

    name: ClassVar[str] = "search-bits"
    fidelity: ClassVar[Fidelity] = Fidelity.BITWISE

    target_bits: float | None = None
    target_kl: float | None = None
    target_bytes: int | None = None
    widths: tuple[Literal[2, 3, 4, 8], ...] = (2, 3, 4, 8)
    unit: Literal["linear", "block"] = "linear"
    group_size: int = 32
    symmetric: bool = False
    tokens: int = 2048
    pairs: int = 32
    tables: int = 24
    order: Order = "greedy"

    def __post_init__(self) -> None:
        targets = (self.target_bits, self.target_kl, self.target_bytes)
        if sum(target is not None for target in targets) != 1:
            raise ValueError("give one of target-bits=, target-kl= and target-bytes=")
        if len(self.widths) < 2 or len(set(self.widths)) != len(self.widths):
            raise ValueError(f"widths are two or more different ones, got {self.widths}")
        for bits in self.widths:
            QuantType(bits, self.group_size, self.symmetric)
        low, high = min(self.widths), max(self.widths)
        if self.target_bits is not None and not low <= self.target_bits <= high:
            raise ValueError(f"target_bits is from {low} to {high}, got {self.target_bits:g}")
        if self.target_kl is not None and not self.target_kl > 0:
            raise ValueError(f"target_kl is above 0, got {self.target_kl:g}")
        if self.tokens < 1 or self.pairs < 0 or self.tables < 0:
            raise ValueError("tokens is at least 1; pairs and tables are at least 0")

    def requires(self, program: Program) -> None:
        """Check that there are blocks to choose for, and that their costs can be measured.

        Raises:
            PassError: there are not, or they cannot.
        """
        check_units(program, self.name)
        if not reads_tokens(program):
            raise PassError(
                f"{self.name}: {program.origin.model} ({program.kind}) reads no tokens, so text "
                "cannot tell what widths cost",
                remedy="assign-bits{score=zd} needs none",
            )
        if self.target_kl is not None and not has_logits(program):
            raise PassError(
                f"{self.name}: {program.origin.model} has no logits, so there is no KL to meet",
                remedy="use target-bits= or target-bytes=",
            )
        self._check_groups(program)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Mark the linears; nothing else changes.

        Raises:
            PassError: the target is out of reach.
        """
        units, _ = find_units(program)
        if self.unit == "linear":
            units = single_linears(program, units)
        windows = context.calibration_tokens(program).tokens
        windows = windows[: max(1, round(self.tokens / windows.shape[1]))]
        rounded = RoundedUnits(program, units, self.group_size, self.symmetric)
        cost = Cost(rounded, context, windows)
        sizes = self._sizes(rounded)
        goal = self._goal(sizes, cost)
        curves = second_order(rounded, self._widths, context, windows)
        with context.progress.task("measuring widths", total=None) as advance:

            def measure(table: Table) -> float:
                advance(1)
                return cost({unit: self._widths[index] for unit, index in enumerate(table)})

            forecast = self._forecast(curves, sizes, cost, advance)
            search = Search(forecast, measure, goal, self.tables, self.order)
            best = search.run()
        figure = "KL" if has_logits(program) else "1 - cosine"
        about = (
            f"{figure} {search.seen[best]:.4g} on {windows.numel()} tokens of calibration text, "
            f"rounded to nearest, best of {len(search.seen)} tables"
        )
        scores = tuple(map(self._row, forecast.alone.tolist()))
        bits = tuple(self._widths[index] for index in best)
        details = {"cost": search.seen[best], "tables": self._tables(units, search)}
        rounding = QuantizeWeights(group_size=self.group_size, symmetric=self.symmetric)
        choice = Chosen(bits, scores, about, rounding)
        result = put_widths(program, self.name, units, choice, details)
        if self.target_bytes is None or 3 not in bits:
            return result
        text = "3 bits are counted as such, and ONNX stores 4; widths=2,4,8 leaves them out"
        told = Remark("missed", self.name, text)
        return replace(result, remarks=(*result.remarks, told))

    def ensures(self, before: Program, after: Program) -> None:
        """Check that only marks changed, and that a shared weight has one width.

        Raises:
            PassError: something else did, or it has not.
        """
        check_only_marked(before, after)

    def _check_groups(self, program: Program) -> None:
        qtype = QuantType(min(self.widths), self.group_size, self.symmetric)
        for unit in find_units(program)[0]:
            for shared in unit.weights:
                check_groups(shared.name, program.weight(shared.name), qtype)

    @property
    def _widths(self) -> tuple[int, ...]:
        """The widths, narrowest first."""
        return tuple(sorted(self.widths))

    def _row(self, costs: Sequence[float]) -> str:
        """Return what a unit costs alone, as text."""
        known = zip(self._widths, costs, strict=True)
        return "costs " + ", ".join(f"{cost:.2g} in {bits}" for bits, cost in known)

    def _sizes(self, rounded: RoundedUnits) -> Tensor:
        """Return what the target counts: bits of codes, or bytes as stored."""
        rows = [
            [
                unit.numbers * bits if self.target_bits is not None else rounded.bytes(unit, bits)
                for bits in self._widths
            ]
            for unit in rounded.units
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def _goal(self, sizes: Tensor, cost: Cost) -> Goal:
        """Return what to meet.

        Raises:
            PassError: no table meets it.
        """
        units, widest = cost.rounded.units, max(self.widths)
        if self.target_kl is not None:
            least = cost(dict.fromkeys(range(len(units)), widest))
            if least > self.target_kl:
                raise PassError(
                    f"{self.name}: target-kl={self.target_kl:g} is out of reach: {widest} bits in "
                    f"all blocks have KL {least:.3g}",
                    remedy="allow more, or give a wider width",
                )
            return Goal(cost=self.target_kl)
        if self.target_bits is not None:
            return Goal(size=self.target_bits * sum(unit.numbers for unit in units))
        assert self.target_bytes is not None
        smallest = int(sizes[:, 0].sum())
        if smallest > self.target_bytes:
            raise PassError(
                f"{self.name}: target-bytes={self.target_bytes} is out of reach: in "
                f"{min(self.widths)} bits the linears of the blocks take {smallest} bytes",
                remedy="allow more, give a narrower width, or larger groups",
            )
        return Goal(size=self.target_bytes)

    def _forecast(self, curves: Tensor, sizes: Tensor, cost: Cost, advance: Advance) -> Forecast:
        """Measure units alone and in pairs, in the narrowest width."""
        count, narrowest = len(curves), min(self.widths)
        measured = []
        for unit in range(count):
            measured.append(cost({unit: narrowest}))
            advance(1)
        alone = torch.tensor(measured, dtype=torch.float64)
        tiny = torch.finfo(torch.float64).tiny
        curves = curves * (alone / curves[:, 0].clamp_min(tiny))[:, None]
        pairs = torch.zeros(count, count, dtype=torch.float64)
        for i, j in first_pairs(alone.tolist(), self.pairs):
            both = cost({i: narrowest, j: narrowest})
            pairs[i, j] = pairs[j, i] = both - measured[i] - measured[j]
            advance(1)
        return Forecast(curves, pairs, sizes)

    def _tables(self, units: Sequence[Unit], search: Search) -> list[dict[str, Any]]:
        """Return the tables that were measured, as a manifest has them."""
        found = []
        for table, cost in search.seen.items():
            bits = [self._widths[index] for index in table]
            text = ",".join(map(str, bits))
            found.append({"bits": round(mean_bits(units, bits), 4), "cost": cost, "widths": text})
        return found


def first_pairs(alone: Sequence[float], count: int) -> list[tuple[int, int]]:
    """Return the pairs to measure: neighbours first, then by falling product of their costs."""
    every = itertools.combinations(range(len(alone)), 2)
    return sorted(every, key=lambda p: (p[1] - p[0] > 1, -alone[p[0]] * alone[p[1]], p))[:count]
