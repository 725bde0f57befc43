"""How much each block changes the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ...ir import Block, PassError, Program, find_blocks, fingerprint
from ..context import PassContext
from ..outputs import observe_graph

Compare = Callable[[int, Tensor, Tensor], None]
"""Takes the number of a block and the residual values that it reads and writes."""


@dataclass(frozen=True, slots=True)
class BlockScores:
    """Scores of a graph's blocks.

    Attributes:
        scores: one per block; nan where a block has no clear residual input or output.
        graph: the graph that the blocks are in.
        tokens: how many tokens were read; 0: no text was needed.
        fingerprint: of the program that was measured.
    """

    scores: tuple[float, ...]
    graph: str
    tokens: int
    fingerprint: str

    def check(self, program: Program) -> None:
        """Check that the scores are those of ``program``.

        Raises:
            PassError: they were measured on another one.
        """
        if fingerprint(program) != self.fingerprint:
            raise PassError(
                "the block scores were measured on another program",
                remedy="measure them again: a pass changed the program since",
            )


def block_influence(
    program: Program, context: PassContext, graph: str | None = None
) -> BlockScores:
    """Measure ``BI(l) = 1 - mean over tokens of cos(h_in, h_out)`` on the calibration text.

    With h_in, h_out: [..., width] the residual values that block l reads and writes.  Values are
    computed in float32, a few windows at a time; cosines and their sums in float64.  Scores are 0
    to 2; 0 for a block that leaves the direction of every token alone.

    Args:
        program: whose blocks to score.
        context: holds the calibration text.
        graph: which graph; None for the only one.

    Raises:
        DataError: there is no calibration text, and none can be made up.

    Source: ShortGPT (arXiv 2403.03853), section 2.3.
    """
    name = next(iter(program.graphs)) if graph is None else graph
    count = len(find_blocks(program.graphs[name]))
    sums, tokens = [0.0] * count, [0] * count

    def compare(index: int, before: Tensor, after: Tensor) -> None:
        cosines = token_cosines(before, after)
        sums[index] += float(cosines.sum())
        tokens[index] += cosines.numel()

    read = compare_ends(program, context, name, compare)
    scores = tuple(1.0 - s / n if n else float("nan") for s, n in zip(sums, tokens, strict=True))
    return BlockScores(scores, name, read, fingerprint(program))


def compare_ends(program: Program, context: PassContext, graph: str, compare: Compare) -> int:
    """Hand the residual values at both ends of each block to ``compare``, a few windows at a time.

    Blocks without one clear residual input and output are left out.  Values are float32.

    Returns:
        How many tokens of the calibration text were read.
    """
    windows = context.calibration_tokens(program).tokens
    part, blocks = _until_last_block(program, graph)
    meter = _Ends(blocks, compare)
    observe_graph(part, graph, windows, meter.observe, context, "scoring blocks")
    return windows.numel()


def _until_last_block(program: Program, name: str) -> tuple[Program, tuple[Block, ...]]:
    """Return a copy that computes the residual stream only: no logits, which take most memory."""
    part = program.editable()
    graph = part.graphs[name]
    ends = [block.output for block in find_blocks(graph) if block.output is not None]
    graph.output_node().args = (tuple(ends[-1:]),)
    signature = part.signatures[name]
    outputs = tuple("residual" for _ in ends[-1:])
    part.signatures[name] = replace(signature, outputs=outputs)
    part.clean()
    return part, find_blocks(graph)


class _Ends:
    """Holds the values that blocks read until what they write is there."""

    def __init__(self, blocks: tuple[Block, ...], compare: Compare) -> None:
        self.compare = compare
        self.ends: dict[fx.Node, list[tuple[int, fx.Node]]] = {}
        self.last_use: dict[fx.Node, fx.Node] = {}
        self.held: dict[fx.Node, Tensor] = {}
        for index, block in enumerate(blocks):
            if block.input is not None and block.output is not None:
                self.ends.setdefault(block.output, []).append((index, block.input))
                self.last_use[block.input] = block.output

    def observe(self, node: fx.Node, value: Tensor) -> None:
        """Take the value of a node."""
        for index, start in self.ends.get(node, ()):
            self.compare(index, self.held[start], value)
            if self.last_use[start] is node:
                del self.held[start]
        if node in self.last_use:
            self.held[node] = value


def token_cosines(before: Tensor, after: Tensor) -> Tensor:
    """Return the cosine of each token's two vectors in float64; 1 where both are equal."""
    a, b = before.double().flatten(0, -2), after.double().flatten(0, -2)
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    cosines = (a * b).sum(-1) / lengths.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where((a == b).all(-1), 1.0, cosines)
