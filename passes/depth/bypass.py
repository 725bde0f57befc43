"""The exact claim of removing blocks: the input program, with those blocks bypassed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ...ir import PassError, Program, find_blocks
from ..blame import place_of
from ..fidelity import same_bits
from ..probes import Inputs, probes
from .removal import Removal


def check_bypassed(before: Program, after: Program, graph: str) -> None:
    """Check that outputs have the bits of ``before`` with the missing blocks bypassed.

    Args:
        before: a program.
        after: it without some blocks of ``graph``.
        graph: which graph.

    Raises:
        PassError: an output has other bits; the message names it and the first wrong node.
    """
    left = {block.key for block in find_blocks(after.graphs[graph])}
    keys = [block.key for block in find_blocks(before.graphs[graph]) if block.key not in left]
    removal = Removal.of(before, graph, keys)
    for name, inputs in probes(before):
        bypass = removal.bypass() if name == graph else {}
        expected = before.run(inputs, name, bypass=bypass)
        given = {new: v for old, v in inputs.items() if (new := removal.name(old)) is not None}
        if set(given) != set(after.signatures[name].inputs):
            raise PassError(f"graph {name} should have the inputs {', '.join(given)}")
        found = after.run(given, name)
        wanted = {new: v for old, v in expected.items() if (new := removal.name(old)) is not None}
        if list(wanted) != list(found):
            raise PassError(f"graph {name} should have the outputs {', '.join(wanted)}")
        for output, value in wanted.items():
            if not same_bits(value, found[output]):
                place = _first_wrong_node(before, after, name, (inputs, given), bypass)
                raise PassError(
                    f"output {output} is not that of the input program without the blocks"
                    f" {', '.join(keys)}{place}",
                    remedy="this is a defect of the pass: leave it out, and report it",
                )


def _first_wrong_node(
    before: Program,
    after: Program,
    graph: str,
    inputs: tuple[Inputs, Inputs],
    bypass: dict[fx.Node, fx.Node],
) -> str:
    """Return the first call whose value differs from that of the call of the same name."""
    expected: dict[str, Any] = {}
    wrong: list[str] = []

    def keep(node: fx.Node, value: Any) -> None:
        expected[node.name] = value

    def compare(node: fx.Node, value: Any) -> None:
        known = expected.get(node.name)
        if wrong or not isinstance(value, Tensor) or not isinstance(known, Tensor):
            return
        if known.shape != value.shape or not torch.equal(known, value):
            wrong.append(f", first wrong at {place_of(node)}")

    before.run(inputs[0], graph, observe=keep, bypass=bypass)
    after.run(inputs[1], graph, observe=compare)
    return wrong[0] if wrong else ""
