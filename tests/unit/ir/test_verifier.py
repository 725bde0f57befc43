"""One broken program per invariant, at least; each error names the rule and the place."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx

from modelathe.ir import INVARIANTS, Program, TensorWeight, VerifyError, find_blocks, verify
from modelathe.ir.blocks import set_info
from support.models import MODELS, canonical, program

aten = torch.ops.aten


def node_of(found: Program, name: str) -> fx.Node:
    return next(node for node in found.graph.nodes if node.name == name)


def reordered(found: Program) -> None:
    node_of(found, "layer_norm").prepend(node_of(found, "linear"))


def untyped(found: Program) -> None:
    del node_of(found, "linear").meta["val"]


def method(found: Program) -> None:
    node_of(found, "relu").op = "call_method"


def python_function(found: Program) -> None:
    node_of(found, "relu").target = torch.relu


def arithmetic_on_tensors(found: Program) -> None:
    node = node_of(found, "relu")
    node.target, node.args = operator.add, (node.args[0], 1)


def foreign_operator(found: Program) -> None:
    node_of(found, "relu").target = torch.ops.mkldnn._is_mkldnn_bf16_supported.default


def writes(found: Program) -> None:
    node_of(found, "relu").target = aten.relu_.default


def weight_gone(found: Program) -> None:
    found.weights.keep_only({"norm.weight"})


def weight_of_another_type(found: Program) -> None:
    table = {name: found.weights[name] for name in found.weights}
    found.weights = type(found.weights)(table | {"up.weight": TensorWeight(torch.zeros(16, 9))})


def weight_written(found: Program) -> None:
    found.weight("up.weight").load().add_(1)


def alias_of_nothing(found: Program) -> None:
    found.weights.aliases["head.weight"] = "embed.weight"


def input_renamed(found: Program) -> None:
    found.signatures["main"] = replace(found.signature, inputs=("y",))


def output_left_out(found: Program) -> None:
    found.graph.output_node().args = ((),)


def shape_noted_wrong(found: Program) -> None:
    node = node_of(found, "relu")
    node.meta["val"] = node.meta["val"].new_empty(3, 99)


def dtype_noted_wrong(found: Program) -> None:
    node = node_of(found, "relu")
    node.meta["val"] = node.meta["val"].half()


def arguments_rejected(found: Program) -> None:
    node = node_of(found, "linear_1")
    node.args = (node_of(found, "layer_norm"), *node.args[1:])


def arguments_missing(found: Program) -> None:
    node_of(found, "linear_1").args = ()


def dimension_out_of_range(found: Program) -> None:
    node = node_of(found, "relu")
    node.target, node.args = aten.sum.dim_IntList, (node.args[0], [7])


Break = Callable[[Program], None]
CASES: list[tuple[Break, str, str, str]] = [
    (reordered, "defined-before-use", "%linear", "is listed before %clone_1, which it reads"),
    (untyped, "typed", "%linear", "has no shape and dtype"),
    (method, "only-known-ops", "%relu", "is a call_method"),
    (python_function, "only-known-ops", "%relu", "calls <built-in method relu"),
    (arithmetic_on_tensors, "only-known-ops", "%relu", "calls <built-in function add>"),
    (foreign_operator, "only-known-ops", "%relu", "calls mkldnn"),
    (writes, "functional", "%relu", "aten.relu_.default writes in place"),
    (weight_gone, "weights-exist", "@norm.bias", "is not a weight of the program"),
    (weight_of_another_type, "weights-exist", "@up.weight", r"is torch.float32 \[16, 9\], and the"),
    (alias_of_nothing, "aliases-intact", "@head.weight", "stands for @embed.weight, which is gone"),
    (input_renamed, "signature-matches", "graph main", r"has inputs \['x'\]"),
    (output_left_out, "signature-matches", "graph main", "does not return 1 values"),
    (shape_noted_wrong, "shapes-agree", "%relu", "gives torch.float32"),
    (dtype_noted_wrong, "shapes-agree", "%relu", "noted is torch.float16"),
    (arguments_rejected, "shapes-agree", "%linear_1", "aten.linear rejects its arguments"),
    (arguments_missing, "shapes-agree", "%linear_1", "aten.linear rejects its arguments"),
    (dimension_out_of_range, "shapes-agree", "%relu", "rejects its arguments"),
]


@pytest.mark.parametrize(("damage", "rule", "where", "detail"), CASES)
def test_a_broken_program_is_named(damage: Break, rule: str, where: str, detail: str) -> None:
    found = program("norm-mlp").editable()
    damage(found)
    with pytest.raises(VerifyError, match=detail) as caught:
        verify(found)
    assert (caught.value.invariant, caught.value.where) == (rule, where)
    assert str(caught.value).startswith(f"{where}: ")
    assert str(caught.value).endswith(f"[{rule}]")


def test_a_weight_written_in_place_is_named() -> None:
    found = program("norm-mlp").editable()
    found.weights = type(found.weights)(
        {name: TensorWeight(found.weights[name].load().clone()) for name in found.weights}
    )
    weight_written(found)
    with pytest.raises(VerifyError, match=r"@up\.weight: was written to in place") as caught:
        verify(found)
    assert caught.value.invariant == "weights-unwritten"


def test_a_block_that_reads_a_later_one_is_named() -> None:
    found = program("tied-blocks").editable()
    first, second = find_blocks(found.graph)
    set_info(first.nodes[1], block=second.key)
    with pytest.raises(VerifyError, match=f"reads %{first.nodes[1].name} of the later") as caught:
        verify(found)
    assert caught.value.invariant == "blocks-partition"
    assert caught.value.where == f"%{first.nodes[2].name}"


def test_every_invariant_has_a_broken_program() -> None:
    tried = {rule for _, rule, _, _ in CASES} | {"weights-unwritten", "blocks-partition"}
    assert {rule.__name__.replace("_", "-") for rule in INVARIANTS} == tried


@pytest.mark.parametrize("name", MODELS)
def test_a_canonical_program_is_legal(name: str) -> None:
    verify(canonical(name))
