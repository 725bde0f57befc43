"""What a program computes for the codes that an artifact chose, where its cache is stored as codes.

Rounding to codes is a step: where a number lies between two codes, another order of summation
decides which, and two right runs differ by whole steps from there on.  So an artifact's codes are
taken as they are.  Each must be within half a step of what the program makes of the tokens when it
reads the artifact's codes itself; everything else is compared as for any other program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..ir import Program, Signature
from ..ir.cache import dequantize_cache, entry_parts, quantize_cache, reads_codes
from .session import Array
from .taken_codes import TakenCodes

Outputs = dict[str, Tensor]
_GIVEN, _NEWEST = "given.", "newest."


class Oracle:
    """Runs a program in float32 beside an artifact of it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._bits: dict[str, int] = {}
        self._reading = _reading_given_codes(program, self._bits)

    def run(
        self,
        inputs: Mapping[str, Tensor],
        graph: str,
        found: Mapping[str, Array],
        codes: Mapping[str, Array],
    ) -> tuple[Outputs, Outputs]:
        """Return what the outputs should be, and what the artifact's outputs amount to.

        Rounded activations are among both.

        Args:
            inputs: of the graph.
            graph: which one.
            found: the artifact's outputs; without a cache of codes they are returned as they are.
            codes: of the artifact's activations, as ``Session.codes`` has them.
        """
        tensors = _tensors(found)
        program = self._reading or self.program
        taken = TakenCodes(program.graphs[graph], codes)
        if self._reading is None:
            expected = self.program.run(inputs, graph, dtype=torch.float32, amend=taken)
            return expected | taken.expected, tensors | taken.found
        names = self._reading.signatures[graph].inputs
        given = {n: tensors[n.removeprefix(_GIVEN)] for n in names if n.startswith(_GIVEN)}
        expected = program.run({**inputs, **given}, graph, dtype=torch.float32, amend=taken)
        for name in [n.removeprefix(_NEWEST) for n in expected if n.startswith(_NEWEST)]:
            newest = expected.pop(f"{_NEWEST}{name}")
            expected |= _expected(name, newest, self._bits[name], inputs)
            tensors |= _amount(name, newest, self._bits[name], tensors)
        return expected | taken.expected, tensors | taken.found

    def present(self, expected: Outputs, found: Mapping[str, Array]) -> Outputs:
        """Return the cache that the next step reads: the program's own, or the artifact's codes."""
        if self._reading is None:
            return expected
        return _tensors(found)


def _tensors(arrays: Mapping[str, Array]) -> Outputs:
    return {n: torch.from_numpy(np.asarray(array, order="C")) for n, array in arrays.items()}


def _reading_given_codes(program: Program, widths: dict[str, int]) -> Program | None:
    """Return the program with all codes as inputs and unrounded new numbers as outputs.

    Args:
        program: to make it of; left as it is.
        widths: is given the bits of every cache output.
    """
    if not any(reads_codes(graph) for graph in program.graphs.values()):
        return None
    made = program.editable()
    for name, graph in made.graphs.items():
        signature = made.signatures[name]
        results: Any = graph.output_node().args[0]
        outputs = dict(zip(signature.outputs, results, strict=True))
        names = {node: output for output, node in outputs.items()}
        dims = dict(signature.dims)
        last = graph.find_nodes(op="placeholder")[-1]
        inputs = list(signature.inputs)
        for read in reads_codes(graph):
            for part in (read.codes, read.scales, read.zeros):
                last = _input(graph, last, part, f"{_GIVEN}{names[part]}")
                read.node.replace_input_with(part, last)
                inputs.append(str(last.target))
                dims[str(last.target)] = tuple(map(str, part.meta["val"].shape))
                del outputs[names[part]]
            outputs[f"{_NEWEST}{names[read.codes]}"] = read.newest
            widths[names[read.codes]] = read.bits
        graph.output_node().args = (tuple(outputs.values()),)
        made.signatures[name] = Signature(tuple(inputs), tuple(outputs), dims, signature.limits)
    made.clean()
    return made


def _input(graph: fx.Graph, after: fx.Node, like: fx.Node, name: str) -> fx.Node:
    with graph.inserting_after(after):
        node = graph.placeholder(name)
    node.meta["val"] = like.meta["val"]
    return node


def _expected(
    name: str, newest: Tensor, bits: int, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the past as it was given, the new numbers, and their scales."""
    codes, scales, zeros = names = entry_parts(name)
    past = {part: inputs[part.replace("present.", "past_key_values.", 1)] for part in names}
    _, steps, _ = quantize_cache(newest, bits)
    return {
        f"{codes}, past": past[codes].flatten(),
        f"{zeros}, past": past[zeros].flatten(),
        scales: torch.cat([past[scales].float(), steps], dim=-2),
        codes: newest,
    }


def _amount(name: str, newest: Tensor, bits: int, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an artifact's past, its scales, and the new numbers as far as codes are to blame.

    A number within half a step of the expected one counts as equal to it.
    """
    names = entry_parts(name)
    codes, scales, zeros = (found[part] for part in names)
    length = newest.shape[-2]
    first = codes.shape[-2] - length
    steps = scales[..., first:, :].float()
    read = dequantize_cache(codes[..., first:, :], steps, zeros[..., first:, :], newest, bits)
    gap = read - newest
    blamed = (gap.abs() - steps / 2).clamp_min(0)
    return {
        f"{name}, past": codes[..., :first, :].flatten(),
        f"{names[2]}, past": zeros[..., :first, :].flatten(),
        names[1]: scales.float(),
        name: newest + torch.where(gap > 0, blamed, -blamed),
    }
