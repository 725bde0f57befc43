"""What the weights of a program read, measured while those before them are already quantised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ...ir import Linear, PassError, Program, Weight
from ...ir.stages import Stages
from ..context import PassContext
from ..outputs import batches, graph_inputs, runner
from .readers import Shared


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of what a weight reads, over the calibration text.

    Attributes:
        matrix: ``X X^T / count`` of the inputs X: [in, count]; float32 [in, in].
        count: vectors, of all readers together.
    """

    matrix: Tensor
    count: int


Quantize = Callable[[list[Shared], Moments], list[Weight]]
"""From weights and what they all read to the weights that are read instead from there on."""


def in_sequence(
    program: Program, wanted: list[Shared], context: PassContext, quantize: Quantize
) -> None:
    """Have every weight quantised on what it reads once all before it are.

    The calibration text goes through each graph once.  All of it stops at each value that weights
    read; there its second moments are taken, one matrix however many weights read the value, and
    the weights are quantised before anything goes on.  What is held is the values at that place,
    one matrix, and one more for each weight with readers that are still to come: it is quantised at
    its last reader, on the sum over all of them, and read unrounded until then.

    Args:
        program: is not changed.
        wanted: the weights; those of embeddings alone are left out.
        context: holds the calibration text.
        quantize: called with all weights that are due at a place; each is given once.

    Raises:
        PassError: what a weight reads is not finite.
        DataError: there is no calibration text, and none can be made up.
    """
    readers = {name: _stops(graph, wanted) for name, graph in program.graphs.items()}
    left = Counter(s.name for stops in readers.values() for read in stops.values() for s in read)
    waiting: dict[str, Moments] = {}
    current = replace(program, weights=program.weights.copy())
    run = runner(current, context.device)
    windows = context.calibration_tokens(program).tokens
    parts = batches(windows)
    with context.progress.task("quantizing", total=sum(left.values())) as advance:
        for name, stops in readers.items():
            if not stops:
                continue
            inputs = [graph_inputs(program, name, batch, run) for batch in parts]
            stages = Stages(current, inputs, name, device=context.device)
            for stop, read in stops.items():
                moments = _measured(stages, stop)
                left.subtract(shared.name for shared in read)
                alone = []  # read here and nowhere else: they can be done together
                for shared in read:
                    found = _sum(waiting.pop(shared.name, None), moments)
                    if left[shared.name]:
                        waiting[shared.name] = found
                    elif found is moments:
                        alone.append(shared)
                    else:
                        _put(current, [shared], quantize([shared], found))
                if alone:
                    _put(current, alone, quantize(alone, moments))
                advance(len(read))


def _put(program: Program, done: list[Shared], weights: list[Weight]) -> None:
    for shared, weight in zip(done, weights, strict=True):
        program.weights.put(shared.name, weight)


def _stops(graph: fx.Graph, wanted: list[Shared]) -> Mapping[fx.Node, list[Shared]]:
    """Return the values that weights are multiplied with, in graph order, and by which."""
    places = {node: index for index, node in enumerate(graph.nodes)}
    found: dict[fx.Node, list[Shared]] = {}
    for shared in wanted:
        for _, node in shared.readers:
            if node in places and (linear := Linear.match(node)) is not None:
                found.setdefault(linear.input, []).append(shared)
    return {stop: found[stop] for stop in sorted(found, key=places.__getitem__)}


def _measured(stages: Stages, stop: fx.Node) -> Moments:
    matrix: Tensor | None = None
    count = 0
    for value in stages.advance(stop):
        x = value.reshape(-1, value.shape[-1])
        if matrix is None:
            matrix = x.new_zeros(x.shape[1], x.shape[1])
        matrix.addmm_(x.T, x)
        count += len(x)
    assert matrix is not None
    if not bool(matrix.diagonal().isfinite().all()):
        raise PassError(
            f"%{stop.name} is not finite on the calibration text",
            remedy="use another calibration text, or see with inspect which weights are damaged",
        )
    return Moments(matrix / count, count)


def _sum(first: Moments | None, second: Moments) -> Moments:
    if first is None:
        return second
    count = first.count + second.count
    return Moments(torch.lerp(first.matrix, second.matrix, second.count / count), count)
