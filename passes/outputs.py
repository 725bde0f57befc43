"""What a model predicts for a batch: the tensor that fidelity measures and healing trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..ir import MAIN, Kind, Program
from .context import PassContext
from .probes import Inputs, empty_cache, feeds, seq2seq_batch, seq2seq_feeds

BATCH_TOKENS = 2048  # read at once where values are measured on text

Runner = Callable[[Inputs, str], Mapping[str, Tensor]]
"""Computes a graph: its inputs and its name to its outputs."""


def batches(windows: Tensor) -> tuple[Tensor, ...]:
    """Return windows of tokens, int64 [windows, length], in parts that are read at once."""
    return torch.split(windows, max(1, BATCH_TOKENS // windows.shape[1]))


def runner(program: Program, device: str = "cpu") -> Runner:
    """Return what runs a graph of ``program`` in float32, without gradients."""

    def run(inputs: Inputs, graph: str) -> Mapping[str, Tensor]:
        return program.run(inputs, graph, dtype=torch.float32, device=device)

    return run


def token_batch(program: Program, tokens: Tensor) -> Inputs:
    """Return what ``predictions`` takes for windows of tokens, int64 [batch, sequence].

    Args:
        program: reads tokens.
        tokens: the windows.
    """
    if program.kind == "encoder-decoder":
        return seq2seq_batch(program, tokens)
    return {"input_ids": tokens}


def predictions(program: Program, batch: Inputs, run: Runner) -> Tensor:
    """Return logits [batch, sequence, vocabulary], or the first output of other models.

    Args:
        program: says what inputs there are.
        batch: what ``token_batch`` gives; all inputs of a model that reads no tokens.
        run: computes its graphs.
    """
    if program.kind == "encoder-decoder":
        return run(seq2seq_feeds(program, batch, run), "decoder")["logits"]
    if program.kind == "decoder":
        tokens = batch["input_ids"]
        return run(feeds(program, tokens, empty_cache(program, len(tokens)), 0), MAIN)["logits"]
    inputs = feeds(program, batch["input_ids"], {}, 0) if program.kind == "encoder" else batch
    return next(iter(run(inputs, MAIN).values()))


def rows_of(kind: Kind, first: Tensor) -> Tensor:
    """Return one row ``[b, width]`` for each item of what a model without logits predicts.

    An encoder's row is the mean over positions, in float64.
    """
    if kind == "encoder" and first.dim() == 3:
        return first.double().mean(1)
    return first.flatten(1) if first.dim() > 1 else first.reshape(1, -1)


def predicting(program: Program) -> set[fx.Node]:
    """Return the calls and weights that ``predictions`` depend on, in every graph."""
    crossed = program.signatures["decoder"].inputs if program.kind == "encoder-decoder" else ()
    todo: list[fx.Node] = []
    for name, graph in program.graphs.items():
        outputs = program.signatures[name].outputs
        wanted = (*crossed, "logits") if program.kind.endswith("decoder") else outputs[:1]
        (results,) = graph.output_node().args
        assert isinstance(results, tuple | list)
        todo += [node for output, node in zip(outputs, results, strict=True) if output in wanted]
    found: set[fx.Node] = set()
    while todo:
        if (node := todo.pop()) not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def graph_inputs(program: Program, graph: str, tokens: Tensor, run: Runner) -> Inputs:
    """Return what a graph of ``program`` reads for windows of tokens, int64 [batch, sequence].

    Args:
        program: reads tokens.
        graph: which graph; what an encoder makes for a decoder is computed.
        tokens: the windows.
        run: computes that.
    """
    if graph == MAIN:
        cache = empty_cache(program, len(tokens)) if program.kind == "decoder" else {}
        return feeds(program, tokens, cache, 0)
    batch = seq2seq_batch(program, tokens)
    if graph == "encoder":
        return {name: batch[name] for name in program.signatures[graph].inputs}
    return seq2seq_feeds(program, batch, run)


def observe_graph(
    program: Program,
    graph: str,
    windows: Tensor,
    observe: Callable[[fx.Node, Any], None],
    context: PassContext,
    title: str,
) -> None:
    """Run one graph in float32 on windows of tokens, int64 [windows, length].

    Args:
        program: reads tokens.
        graph: which graph.
        windows: read a few at a time.
        observe: is given every node and its value.
        context: device and progress.
        title: of the work, for the user.
    """
    run = runner(program, context.device)
    with context.progress.task(title, total=len(windows)) as advance:
        for batch in batches(windows):
            inputs = graph_inputs(program, graph, batch, run)
            program.run(inputs, graph, observe, torch.float32, device=context.device)
            advance(len(batch))
