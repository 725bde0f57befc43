"""Where norms lead to, and linears that are split for it and joined again."""

from __future__ import annotations

import torch

from modelathe.ir import Linear, Norm, mark, marks_of
from modelathe.passes import TieBlocks
from modelathe.passes.norms.paths import path_of_norm, rejoin, separate, split_fused
from modelathe.passes.probes import probe
from modelathe.passes.training.switches import SWITCH
from support.models import canonical
from support.numeric import assert_same_bits
from support.training import context
from support.views import views


def test_parts_of_a_linear_stay_apart_where_what_they_read_differs() -> None:
    program = canonical("gpt2")
    split = program.editable()
    for node in split_fused(split, split.graph):
        scaled = split.graph.call_function(torch.ops.aten.mul.Tensor, (node.args[0], 2.0))
        node.prepend(scaled)
        scaled.meta |= {"val": node.args[0].meta["val"]}
        node.replace_input_with(node.args[0], scaled)
    before = len(views(Linear, split))
    rejoin(split, split.graph)
    assert len(views(Linear, split)) == before > len(views(Linear, program))
    assert not any(marks_of(node) for node in split.graph.nodes)


def test_a_split_and_a_joined_linear_are_the_same() -> None:
    program = canonical("gpt2")
    split = program.editable()
    assert split_fused(split, split.graph)
    rejoin(split, split.graph)
    given = probe(program, "main", batch=2, sequence=5, past=3)
    assert_same_bits(split.run(given), program.run(given))
    assert len(views(Linear, split)) == len(views(Linear, program))


def test_the_paths_of_norms_are_found_in_the_graph() -> None:
    program = canonical("gpt2")
    found = [path_of_norm(program.graph, norm) for norm in views(Norm, program)]
    assert found == ["query-key", "mlp"] * 2 + ["final"]


def test_norms_that_wait_for_healing_stay_apart() -> None:
    program = canonical("gpt2").editable()
    first = views(Norm, program)[0]
    split_fused(program, program.graph)
    separate(program.graph, first)
    parts = [norm for norm in views(Norm, program) if norm.input is first.input]
    for norm in parts:
        mark(norm.node, SWITCH, "a pass")
    rejoin(program, program.graph)
    assert [norm for norm in views(Norm, program) if norm.input is first.input] == parts
    assert len(parts) == 2


def test_linears_that_share_a_weight_share_its_parts_and_the_joined_one() -> None:
    tied = TieBlocks(unique=1)(canonical("gpt2"), context()).program
    split = tied.editable()

    def new() -> int:
        read = views(Linear, split)
        return len({str(linear.weight.target) for linear in read if linear} - set(tied.weights))

    split_fused(split, split.graph)
    assert new() == 3
    rejoin(split, split.graph)
    assert new() == 1
