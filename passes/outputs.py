"""What a model predicts for a batch: the tensor that fidelity measures and healing trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..ir import MAIN, Program
from .probes import Inputs, empty_cache, feeds, seq2seq_feeds

Runner = Callable[[Inputs, str], Mapping[str, Tensor]]
"""Computes a graph: its inputs and its name to its outputs."""


def runner(program: Program, device: str = "cpu") -> Runner:
    """Return what runs a graph of ``program`` in float32, without gradients."""

    def run(inputs: Inputs, graph: str) -> Mapping[str, Tensor]:
        return program.run(inputs, graph, dtype=torch.float32, device=device)

    return run


def predictions(program: Program, batch: Inputs, run: Runner) -> Tensor:
    """Return logits [batch, sequence, vocabulary], or the first output of other models.

    Args:
        program: says what inputs there are.
        batch: ``input_ids``; for an encoder-decoder what ``seq2seq_batch`` gives; else all inputs.
        run: computes its graphs.
    """
    if program.kind == "encoder-decoder":
        return run(seq2seq_feeds(program, batch, run), "decoder")["logits"]
    if program.kind == "decoder":
        tokens = batch["input_ids"]
        return run(feeds(program, tokens, empty_cache(program, len(tokens)), 0), MAIN)["logits"]
    inputs = feeds(program, batch["input_ids"], {}, 0) if program.kind == "encoder" else batch
    return next(iter(run(inputs, MAIN).values()))
