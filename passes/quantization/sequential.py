"""What the weights of a program read, measured while those before them are already quantised."""

from __future__ import annotations

from collections.abc import Callable
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
    read; there its second moments are taken, and weights are quantised before anything goes on.
    Weights that read the same values, such as a block's queries, keys and values, are quantised
    together.  Those with several readers are at the last one, on the sum over all of them, and read
    unrounded until then.  What is held is the values at a place, one matrix, and one more for each
    set of weights that waits for further readers.

    Args:
        program: is not changed.
        wanted: the weights; those of embeddings alone are left out.
        context: holds the calibration text.
        quantize: called with all weights that are due at a place; each is given once.

    Raises:
        PassError: what a weight reads is not finite.
        DataError: there is no calibration text, and none can be made up.
    """
    groups = _groups(program, wanted)
    read = {node for inputs in groups for node in inputs}
    waiting: dict[tuple[fx.Node, ...], Moments] = {}
    current = replace(program, weights=program.weights.copy())
    run = runner(current, context.device)
    windows = context.calibration_tokens(program).tokens
    parts = batches(windows)
    total = sum(len(inputs) * len(group) for inputs, group in groups.items())
    with context.progress.task("quantizing", total=total) as advance:
        for name, graph in program.graphs.items():
            stops = [node for node in graph.nodes if node in read]
            if not stops:
                continue
            given = [graph_inputs(program, name, batch, run) for batch in parts]
            stages = Stages(current, given, name, device=context.device)
            for stop in stops:
                moments = _measured(stages, stop)
                for inputs, group in groups.items():
                    if not (times := inputs.count(stop)):
                        continue
                    here = replace(moments, count=times * moments.count)
                    found = _sum(waiting.pop(inputs, None), here)
                    if stop is not inputs[-1]:
                        waiting[inputs] = found
                    else:
                        for shared, weight in zip(group, quantize(group, found), strict=True):
                            current.weights.put(shared.name, weight)
                    advance(times * len(group))


def _groups(program: Program, wanted: list[Shared]) -> dict[tuple[fx.Node, ...], list[Shared]]:
    """Return the weights by the values that they are multiplied with, one for each reader.

    The values are in the order in which they are computed.
    """
    nodes = [node for graph in program.graphs.values() for node in graph.nodes]
    places = {node: index for index, node in enumerate(nodes)}
    found: dict[tuple[fx.Node, ...], list[Shared]] = {}
    for shared in wanted:
        linears = [linear for _, node in shared.readers if (linear := Linear.match(node))]
        inputs = sorted((linear.input for linear in linears), key=places.__getitem__)
        if inputs:
            found.setdefault(tuple(inputs), []).append(shared)
    return found


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
