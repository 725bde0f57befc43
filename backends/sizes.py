"""How large a program is: parameters as the model has them, bytes as they are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..ir import (
    Program,
    QuantizedEmbedding,
    QuantizedLinear,
    find_blocks,
)
from ..ir.sparse import outlier_sums


@dataclass(frozen=True, slots=True)
class ProgramSizes:
    """Counts of one program.

    Attributes:
        blocks: transformer layers, of all graphs together.
        parameters: numbers that the weights stand for; a quantised one counts once, its scales
            and outliers not.
        bytes: of everything that is stored, with scales, zero points, and outliers' places.
        buffer_bytes: of what is stored and is no parameter, nor belongs to the codes of one.
    """

    blocks: int
    parameters: int
    bytes: int
    buffer_bytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each parameter, buffers left out."""
        return 8 * (self.bytes - self.buffer_bytes) / self.parameters if self.parameters else 0.0


def program_sizes(program: Program) -> ProgramSizes:
    """Count blocks, parameters and bytes; reads no weight."""
    meant: dict[str, int] = {}
    extra: set[str] = set()
    for graph in program.graphs.values():
        for one in outlier_sums(graph):
            extra |= {str(part.target) for part in one.parts}
        for node in graph.nodes:
            call = QuantizedLinear.match(node) or QuantizedEmbedding.match(node)
            if call is None:
                continue
            rows = program.weight(call.codes).shape[0]
            meant[str(call.codes.target)] = rows * call.in_features
            others = (call.scales, call.zeros)
            extra |= {str(one.target) for one in others if one is not None}
    parameters = total = buffers = 0
    for name in program.weights:
        weight = program.weights[name]
        total += weight.bytes
        if name in meant:
            parameters += meant[name]
        elif name not in extra and program.weights.is_parameter(name):
            parameters += math.prod(weight.shape)
        elif name not in extra:
            buffers += weight.bytes
    blocks = sum(len(find_blocks(graph)) for graph in program.graphs.values())
    return ProgramSizes(blocks, parameters, total, buffers)
