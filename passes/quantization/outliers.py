"""Entries of a weight that are kept as they are, beside the codes of all others.

``W ~ V + H``: V on a grid, and zero where H is not; H of few entries.  The entries of H are chosen
once, and are not among those that the grid has to cover.  In the sweeps they are columns' entries
like all others, but for not being rounded: each takes its least-squares value given all others, so
that a sweep of rounded columns after another never raises the error.

That is the problem of QuantEase's outlier-aware variant (arXiv 2309.01885, section 4: structured
outliers are whole columns, unstructured ones single entries).  There H takes gradient steps cut
back to its largest entries, from the largest of W on; this is a reconstruction that solves for H
exactly, column by column, and leaves it where it was.
"""

from __future__ import annotations

import copy
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx

from ...ir import PassError, Program
from ...ir.quant import QuantizedTensor, QuantType, quantize
from ...ir.sparse import OutlierSum, add_entries, flat_places, index_dtype, outlier_sums

Kind = Literal["structured", "unstructured"]
KINDS: tuple[Kind, ...] = ("structured", "unstructured")


def choose_outliers(
    weight: Tensor, power: Tensor, share: float | None, kind: Kind, qtype: QuantType
) -> Tensor:
    """Return which entries of a weight are kept: bool [out, in].

    Unstructured: the largest.  Structured: the largest columns, or those whose rounding to nearest
    costs the most, by ``|W_j - round(W_j)|**2 S_jj`` (as in OWQ, arXiv 2306.02272): whichever
    leaves less of that cost in the others, on the narrower grid.  A column that reads nothing but
    zeros is never kept.

    Args:
        weight: [out, in].
        power: [in], the mean square of what each column is multiplied with.
        share: of the entries, or of the columns, rounded to a whole number; none: none.
        kind: structured (whole columns) or unstructured.
        qtype: the number type of the others.

    Raises:
        ValueError: the weight is not finite.
    """
    chosen = torch.zeros_like(weight, dtype=torch.bool)
    if share is None:
        return chosen
    if kind == "structured":
        count = round(share * len(power))
        sets = [
            by.topk(count).indices
            for by in (_costs(weight, power, qtype), weight.square().sum(0) * (power > 0))
        ]
        left = [_costs(weight.index_fill(1, columns, 0), power, qtype).sum() for columns in sets]
        chosen[:, sets[int(left[1] < left[0])]] = True
    else:
        chosen.view(-1)[weight.abs().flatten().topk(round(share * weight.numel())).indices] = True
    return chosen & (power > 0)


def _costs(weight: Tensor, power: Tensor, qtype: QuantType) -> Tensor:
    """Return what rounding each column of a weight to nearest costs: [in]."""
    return (weight - quantize(weight, qtype).dequantize()).square().sum(0) * power


@dataclass(frozen=True, slots=True)
class Outliers:
    """What is kept of a weight ``[out, in]`` beside its codes.

    Attributes:
        values: structured: whole columns, [out, count]; unstructured: entries, row by row, [count].
        columns: [count], where; ascending, for entries in each row.  int32 for whole columns, as a
            gather reads them; for entries the narrowest type that holds a row's width.
        counts: unstructured: entries of each row, [out], of the same type; None: structured.
    """

    values: Tensor
    columns: Tensor
    counts: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, kept: Tensor, kind: Kind) -> Outliers | None:
        """Return the entries of ``weight [out, in]`` where ``kept`` is true; none: None."""
        if not bool(kept.any()):
            return None
        if kind == "structured":
            columns = kept.any(0).nonzero().view(-1)
            return cls(weight[:, columns].contiguous(), columns.to(torch.int32))
        narrow = index_dtype(weight.shape[1])
        columns = kept.nonzero()[:, 1]
        return cls(weight[kept], columns.to(narrow), kept.sum(1).to(narrow))

    @classmethod
    def read(cls, program: Program, call: OutlierSum) -> Outliers:
        """Return what a call of the program reads."""
        return cls(*(program.weight(part).load() for part in call.parts))

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors that are stored, by name."""
        found = {"values": self.values, "columns": self.columns}
        return found if self.counts is None else {**found, "counts": self.counts}

    @property
    def nbytes(self) -> int:
        """Bytes as stored, places included."""
        return sum(part.nbytes for part in self.parts().values())

    @property
    def count(self) -> str:
        """How many, in words."""
        return f"{len(self.columns)} {'columns' if self.counts is None else 'entries'}"

    def add_to(self, part: Tensor, rows: slice) -> None:
        """Add the entries of some rows of the weight to ``part [rows, in]``, in place."""
        if self.counts is None:
            part[:, self.columns] += self.values[rows].to(part.dtype)
        else:
            places = flat_places(self.columns, self.counts, part.shape[1])
            add_entries(part, rows, self.values, places)

    def is_inside(self, shape: tuple[int, int]) -> bool:
        """Tell whether all lie in a weight ``[out, in]``, each once and in order."""
        (out, width), columns = shape, self.columns.long()
        places = columns
        if self.counts is not None:
            if len(self.counts) != out or int(self.counts.sum()) != len(columns):
                return False
            places = flat_places(columns, self.counts, width)
        inside = bool(((columns >= 0) & (columns < width)).all())
        return inside and bool((places.diff() > 0).all())


@dataclass(frozen=True, slots=True)
class Solved:
    """A weight as it is stored: codes, and what is kept beside them.

    Attributes:
        codes: zero where outliers are.
        outliers: added to what the codes stand for; None: none.
    """

    codes: QuantizedTensor
    outliers: Outliers | None = None

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.codes.nbytes + (0 if self.outliers is None else self.outliers.nbytes)

    def cpu(self) -> Solved:
        """The same in the memory of the processor."""
        codes, kept = self.codes, self.outliers
        zeros = None if codes.zeros is None else codes.zeros.cpu()
        codes = replace(codes, codes=codes.codes.cpu(), scales=codes.scales.cpu(), zeros=zeros)
        if kept is not None:
            counts = None if kept.counts is None else kept.counts.cpu()
            kept = Outliers(kept.values.cpu(), kept.columns.cpu(), counts)
        return Solved(codes, kept)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight ``[out, in]`` in ``dtype`` (default: that of the scales)."""
        weight = self.codes.dequantize(dtype)
        if self.outliers is not None:
            self.outliers.add_to(weight, slice(0, weight.shape[0]))
        return weight


def without_outliers(
    graph: fx.Graph, known: Container[str]
) -> tuple[fx.Graph, dict[fx.Node, OutlierSum]]:
    """Return a copy of a graph without the products with outliers, and those products.

    Args:
        graph: is not changed.
        known: names of weights; products with these stay.

    Returns:
        The copy, and for the node of each quantised linear in it the sum that it was part of.
    """
    plain = copy.deepcopy(graph)
    found = {}
    for one in outlier_sums(plain):
        if str(one.values.target) not in known:
            one.node.replace_all_uses_with(one.product.node)
            found[one.product.node] = one
    return plain, found


def check_outliers(name: str, stored: QuantizedTensor, outliers: Outliers) -> None:
    """Check that outliers lie where the codes stand for zero, each once.

    Raises:
        PassError: they do not.
    """
    if not outliers.is_inside(stored.shape):
        raise PassError(f"@{name}: the places of its outliers are not ascending or not inside")
    ones = replace(outliers, values=torch.ones_like(outliers.values))
    for rows, tile in stored.tiles():
        numbers = tile.dequantize()
        chosen = torch.zeros_like(numbers)
        ones.add_to(chosen, rows)
        if bool((numbers * chosen).any()):
            raise PassError(f"@{name}: codes do not stand for zero where its outliers are")
