"""Fewer bits for the blocks that matter least, by a score of each block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ...ir import PassError, Program
from ..analysis.block_influence import BlockScores
from ..analysis.lim import Aggregation, lim
from ..analysis.zd import Sided, zd
from ..base import Fidelity, Pass, PassResult
from ..context import PassContext, reads_tokens
from .quantize_weights import Bits
from .units import Unit, check_units, find_units
from .widths import Chosen, check_only_marked, mean_bits, put_widths

Score = Literal["lim", "zd", "random", "reverse", "reverse-zd"]


@dataclass(frozen=True, kw_only=True)
class AssignBits(Pass):
    """Choose widths for the linears of each block: the K least important blocks get ``low`` bits.

    Blocks are sorted from the least to the most important:

    - ``lim``: by rising ``LIM(l) = -cos(h[l], h[l + 1])`` on the calibration text, with h[l] and
      h[l + 1] the residual values that block l reads and writes (-1: it changes nothing).
    - ``zd``: by falling ``ZD(l) = #{k: z_k > 1} / #weights``, z the weights of the block's linears
      less their mean, over their deviation.  No text is needed.
    - ``random``: by the seed of the run.  ``reverse`` and ``reverse-zd``: the other way round, to
      see what an order is worth.

    Of L blocks, ``K = round(fraction * L)``; with ``target-bits`` that K whose mean width, weighted
    by how many numbers the blocks have, is nearest, which for equal blocks is
    ``round(L * (high - target) / (high - low))``.  So low-bit sets are nested, and fractions 0 and
    1 are the uniform widths.

    The widths are marks (``!bits=4``) that ``quantize-weights`` without ``bits=`` obeys; nothing is
    rounded here.  Blocks that share weights get one width, that of the most important of them, and
    count as one.  Embeddings, norms, the head and other linears outside the blocks are not touched.
    Remarks have the table of scores and widths, and the same as text: one ``quantize-weights`` for
    each width.  With round-to-nearest that text makes the same codes; calibrated methods see
    other inputs, for each pass of the text begins with what the one before has left unrounded.

    Refuses, as an error: a program without repeated blocks; one that is quantised already, for
    scores are those of the program before; ``lim`` on a model that reads no tokens.  Leaves alone,
    with a remark, weights that something outside the blocks reads too, and those that are no factor
    of a linear.  A block without one clear residual value at both ends has no LIM, and counts as
    important.

    Source: Layer-Wise Quantization (arXiv 2406.17415).  How LIM puts tokens together and what ZD
    pools are reconstructions, and options.

    Attributes:
        score: lim, zd, random, reverse (of lim) or reverse-zd.
        low: width for the least important blocks.
        high: width for the others.
        fraction: share of the blocks that get ``low``; none: 0.5, or as ``target_bits`` says.
        target_bits: mean width to come near to, from ``low`` to ``high``, scales not counted.
        agg: of lim: flatten, one cosine for all tokens, or token-mean, the mean of their cosines.
        skip_first: of lim: leave out the first token of every window.
        sided: of zd: one counts z > 1, two counts abs(z) > 1.
        pooled: of zd: z over all numbers of a block; else the mean over its matrices.
    """

    name: ClassVar[str] = "assign-bits"
    fidelity: ClassVar[Fidelity] = Fidelity.BITWISE

    score: Score = "lim"
    low: Bits = 4
    high: Bits = 8
    fraction: float | None = None
    target_bits: float | None = None
    agg: Aggregation = "flatten"
    skip_first: bool = False
    sided: Sided = "one"
    pooled: bool = True

    def __post_init__(self) -> None:
        if self.low not in (2, 3, 4, 8) or self.high not in (2, 3, 4, 8):
            raise ValueError(f"widths are 2, 3, 4 or 8, got low={self.low} and high={self.high}")
        if self.low >= self.high:
            raise ValueError(f"low is less than high, got {self.low} and {self.high}")
        if self.fraction is not None and self.target_bits is not None:
            raise ValueError("give fraction= or target-bits=, and not both")
        if self.fraction is not None and not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction is a share from 0 to 1, got {self.fraction}")
        if self.target_bits is not None and not self.low <= self.target_bits <= self.high:
            raise ValueError(
                f"target_bits is from low={self.low} to high={self.high}, got {self.target_bits:g}"
            )
        if not self._reads_text and (self.agg != "flatten" or self.skip_first):
            raise ValueError(f"agg and skip_first are options of lim, and score is {self.score}")
        if self.score not in ("zd", "reverse-zd") and (self.sided != "one" or not self.pooled):
            raise ValueError(f"sided and pooled are options of zd, and score is {self.score}")

    @property
    def _reads_text(self) -> bool:
        return self.score in ("lim", "reverse")

    def requires(self, program: Program) -> None:
        """Check that there are blocks to choose for, and that they can be scored.

        Raises:
            PassError: there are not, or they cannot.
        """
        check_units(program, self.name)
        if self._reads_text and not reads_tokens(program):
            raise PassError(
                f"{self.name}: {program.origin.model} ({program.kind}) reads no tokens, so text "
                "cannot score its blocks",
                remedy="score=zd needs none",
            )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Mark the linears; nothing else changes."""
        units, _ = find_units(program)
        scores, about = self._scores(program, units, context)
        order = least_important(scores, reverse=self.score.startswith("reverse"))
        low = set(order[: self._count(units, order)])
        bits = tuple(self.low if index in low else self.high for index in range(len(units)))
        name = "zd" if "zd" in self.score else "lim"
        texts = tuple(
            f"place {order.index(index) + 1}" if self.score == "random" else _text(name, score)
            for index, score in enumerate(scores)
        )
        count = f"{len(low)} of {len(units)} blocks in {self.low} bits"
        return put_widths(program, self.name, units, Chosen(bits, texts, f"{about}: {count}"))

    def ensures(self, before: Program, after: Program) -> None:
        """Check that only marks changed, and that a shared weight has one width.

        Raises:
            PassError: something else did, or it has not.
        """
        check_only_marked(before, after)

    def _scores(
        self, program: Program, units: Sequence[Unit], context: PassContext
    ) -> tuple[list[float], str]:
        """Return how important each unit is, and what that is called."""
        if self.score == "random":
            generator = torch.Generator().manual_seed(context.seed)
            places = torch.randperm(len(units), generator=generator)
            return places.tolist(), f"chance, seed {context.seed}"
        found: dict[str, BlockScores] = {}
        for graph in dict.fromkeys(graph for unit in units for graph, _ in unit.places):
            if self._reads_text:
                found[graph] = lim(
                    program, context, graph, agg=self.agg, skip_first=self.skip_first
                )
            else:
                found[graph] = zd(program, graph, sided=self.sided, pooled=self.pooled)
        sign = 1 if self._reads_text else -1
        scores = [
            max(_importance(sign * found[graph].scores[index]) for graph, index in unit.places)
            for unit in units
        ]
        tokens = max(one.tokens for one in found.values())
        return scores, f"{self.score} on {tokens} tokens" if tokens else self.score

    def _count(self, units: Sequence[Unit], order: Sequence[int]) -> int:
        """Return how many units get ``low``."""
        target = self.target_bits
        if target is None:
            return round((0.5 if self.fraction is None else self.fraction) * len(units))
        means = []
        for count in range(len(units) + 1):
            low = set(order[:count])
            bits = [self.low if index in low else self.high for index in range(len(units))]
            means.append(mean_bits(units, bits))
        return min(range(len(means)), key=lambda count: abs(means[count] - target))


def least_important(scores: Sequence[float], *, reverse: bool = False) -> list[int]:
    """Return the numbers of the units from the least to the most important, or the other way."""
    order = sorted(range(len(scores)), key=lambda index: (scores[index], index))
    return order[::-1] if reverse else order


def _importance(score: float) -> float:
    return math.inf if math.isnan(score) else score


def _text(name: str, importance: float) -> str:
    if math.isinf(importance):
        return f"no {name}"
    return f"{name} {importance if name == 'lim' else -importance:.4f}"
