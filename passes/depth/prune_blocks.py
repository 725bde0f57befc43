"""Remove whole transformer blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...ir import Block, PassError, Program, find_blocks
from ..analysis.block_influence import block_influence
from ..base import Fidelity, Pass, PassResult, Remark
from ..context import PassContext
from .block_config import without_blocks
from .bypass import check_bypassed
from .obstacles import obstacles
from .removal import Removal, remove


@dataclass(frozen=True, kw_only=True)
class PruneBlocks(Pass):
    """Remove whole transformer blocks; the residual stream joins the gap.

    With h[l]: [batch, sequence, width] the residual value that block l reads and h[l + 1] the one
    it writes: every reader of h[l + 1] reads h[l] instead, and nothing of block l is left.  Its
    cache entries go, and those of later blocks move up.  The block count and the per-block lists
    of the configuration (such as ``layer_types``) lose the same entries.  No weight changes, so
    the result has the bits of the model with those blocks deleted.

    ``blocks`` says which ones, by their number in the input program.  ``count`` removes, all at
    once, those that change the residual stream least on the calibration text:
    score(l) = 1 - mean over tokens of cos(h[l], h[l + 1]), in float32, averaged in float64.

    An encoder-decoder has blocks in both graphs: ``graph`` says which are meant, the decoder's by
    default.  A removed decoder block takes its cross-attention keys and values out of the encoder.

    Refuses, as an error: a graph without repeated blocks; a number that no block has; removing all
    blocks; blocks whose input and output differ in shape, as stages of a convolutional network do;
    blocks that are calls of one module; a block that makes something else for later blocks, such
    as T5's position bias (``count`` passes over those); a configuration that cannot say what the
    model is without the blocks.  A second run removes more blocks.

    Source: ShortGPT (arXiv 2403.03853) for the score and for removing in one shot.

    Attributes:
        blocks: numbers of the blocks to remove, from 0.
        count: how many to remove, those with the lowest scores; instead of ``blocks``.
        graph: whose blocks, in an encoder-decoder; none: the decoder's.
    """

    name: ClassVar[str] = "prune-blocks"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    changes_signature: ClassVar[bool] = True

    blocks: tuple[int, ...] = ()
    count: int | None = None
    graph: Literal["encoder", "decoder"] | None = None

    def __post_init__(self) -> None:
        if bool(self.blocks) == (self.count is not None):
            raise ValueError("give either blocks= or count=, and not both")
        if self.count is not None and self.count < 1:
            raise ValueError(f"count is at least 1, got {self.count}")
        if any(index < 0 for index in self.blocks):
            raise ValueError(f"blocks are numbered from 0, got {min(self.blocks)}")
        if len(set(self.blocks)) != len(self.blocks):
            raise ValueError(f"blocks names a block twice: {', '.join(map(str, self.blocks))}")

    def requires(self, program: Program) -> None:
        """Check that the blocks exist, and that those named can go.

        Raises:
            PassError: they do not, or they cannot.
        """
        blocks = self._blocks(program)
        missing = [index for index in self.blocks if index >= len(blocks)]
        if missing:
            raise PassError(
                f"prune-blocks: there is no block {missing[0]}",
                remedy=f"blocks are numbered 0 to {len(blocks) - 1}",
            )
        if (self.count or len(self.blocks)) >= len(blocks):
            raise PassError(
                f"prune-blocks: that removes all {len(blocks)} blocks",
                remedy=f"remove at most {len(blocks) - 1}",
            )
        reasons = obstacles(blocks)
        for index in self.blocks:
            if index in reasons:
                raise PassError(f"prune-blocks: {reasons[index]}", remedy=_others(blocks, reasons))
        left = len(blocks) - len(reasons)
        if self.count is not None and self.count > left:
            reason = next(iter(reasons.values()))
            raise PassError(f"prune-blocks: only {left} blocks can be removed: {reason}")

    def run(self, program: Program, context: PassContext) -> PassResult:
        graph, blocks = self._graph(program), self._blocks(program)
        remarks: list[Remark] = []
        indices = sorted(self.blocks) or self._lowest(program, context, blocks, remarks)
        program.config = without_blocks(program.config, indices, len(blocks), self._role(program))
        keys = [blocks[index].key for index in indices]
        remove(program, Removal.of(program, graph, keys))
        kept = len(blocks) - len(indices)
        for index in indices:
            where = blocks[index].key
            remarks.append(Remark("applied", where, f"removed block {index} of {len(blocks)}"))
        remarks.append(Remark("applied", graph, f"{kept} of {len(blocks)} blocks kept"))
        return PassResult(program, tuple(remarks))

    def ensures(self, before: Program, after: Program) -> None:
        """Check that outputs have the bits of the input program with the blocks bypassed.

        Raises:
            PassError: other blocks are gone, or an output has other bits; the message names it and
                the first wrong node.
        """
        left = {block.key for block in find_blocks(after.graphs[self._graph(before)])}
        gone = {block.index: block.key for block in self._blocks(before) if block.key not in left}
        if set(gone) != set(self.blocks or gone) or len(gone) != (self.count or len(self.blocks)):
            raise PassError(f"prune-blocks: the blocks {', '.join(gone.values())} are gone")
        check_bypassed(before, after, self._graph(before))

    def _graph(self, program: Program) -> str:
        """Return the name of the graph that the options mean.

        Raises:
            PassError: there is no such graph.
        """
        names = list(program.graphs)
        if len(names) == 1 and self.graph is None:
            return names[0]
        wanted = self.graph or "decoder"
        if wanted in names:
            return wanted
        raise PassError(
            f"prune-blocks: there is no graph {wanted}: the program has {', '.join(names)}",
            remedy="graph= is for encoder-decoders; leave it out",
        )

    def _blocks(self, program: Program) -> tuple[Block, ...]:
        blocks = find_blocks(program.graphs[self._graph(program)])
        if not blocks:
            raise PassError(
                "prune-blocks: the graph has no repeated blocks", remedy="leave the pass out"
            )
        return blocks

    def _role(self, program: Program) -> str:
        """Return which count of an encoder-decoder's configuration is meant."""
        graph = self._graph(program)
        return graph if graph in ("encoder", "decoder") else program.kind

    def _lowest(
        self,
        program: Program,
        context: PassContext,
        blocks: tuple[Block, ...],
        remarks: list[Remark],
    ) -> list[int]:
        """Return the numbers of the blocks with the lowest scores among those that can go."""
        assert self.count is not None
        found = block_influence(program, context, self._graph(program))
        found.check(program)
        reasons = obstacles(blocks)
        order = sorted(range(len(blocks)), key=lambda index: _rank(found.scores[index]))
        chosen = [index for index in order if index not in reasons][: self.count]
        worst = max(found.scores[index] for index in chosen)
        for index, reason in reasons.items():
            if not found.scores[index] > worst:
                remarks.append(Remark("missed", blocks[index].key, reason))
        scores = ", ".join(f"{index}: {score:.4g}" for index, score in enumerate(found.scores))
        text = f"block influence on {found.tokens} tokens: {scores}"
        remarks.append(Remark("applied", found.graph, text))
        return sorted(chosen)


def _rank(score: float) -> float:
    return math.inf if math.isnan(score) else score


def _others(blocks: tuple[Block, ...], reasons: dict[int, str]) -> str:
    left: list[Any] = [index for index in range(len(blocks)) if index not in reasons]
    if not left:
        return "no block of this model can be removed: leave the pass out"
    return f"blocks that can be removed: {', '.join(map(str, left))}"
