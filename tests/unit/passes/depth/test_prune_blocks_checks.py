"""A pruned program that is not its input with the blocks bypassed is caught, at the right node."""

from __future__ import annotations

from typing import Any

import pytest

from modelathe.ir import PassError, Program, find_blocks
from modelathe.passes import PruneBlocks
from support.models import canonical


def tampered(change: Any) -> tuple[Program, Program]:
    """Return a program and a wrong one that it was pruned to."""
    before = canonical("gemma3")
    after = PruneBlocks(blocks=(1,))(before).program.editable()
    change(after)
    return before, after


def swap_cache(after: Program) -> None:
    results: Any = after.graph.output_node().args[0]
    after.graph.output_node().args = ((results[0], *results[3:], *results[1:3]),)


def join_too_late(after: Program) -> None:
    first, second = find_blocks(after.graph)
    assert first.input is not None
    assert first.output is not None
    for node in second.nodes:
        node.replace_input_with(first.output, first.input)


def keep_the_names(after: Program) -> None:
    names = {f"present.1.{part}": f"present.2.{part}" for part in ("key", "value")}
    after.signatures["main"] = after.signature.renamed(names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_cache, r"output present\.0\.key is not that of the input program"),
        (join_too_late, "first wrong at %rms_norm"),
        (keep_the_names, "should have the outputs"),
    ],
)
def test_a_wrong_result_is_caught(change: Any, message: str) -> None:
    before, after = tampered(change)
    with pytest.raises(PassError, match=message):
        PruneBlocks(blocks=(1,)).ensures(before, after)
