"""The text form is stable, and the fingerprint knows what may change a value."""

from __future__ import annotations

import pytest
import torch

from modelathe.ir import FileWeight, TensorWeight, fingerprint, graph_text, to_text
from support.models import program

NORM_MLP = """\
weight @norm.weight: f32[8]
weight @norm.bias: f32[8]
weight @up.weight: f32[16, 8]
weight @up.bias: f32[16]
weight @down.weight: f32[8, 16]
input %x x: f32[d0, 8]
%layer_norm = aten.layer_norm(%x, [8], @norm.weight, @norm.bias, 1e-05, False): f32[d0, 8]
%clone = aten.clone(%layer_norm): f32[d0, 8]
%clone_1 = aten.clone(%clone): f32[d0, 8]
%linear = aten.linear(%clone_1, @up.weight, @up.bias): f32[d0, 16]
%relu = aten.relu(%linear): f32[d0, 16]
%linear_1 = aten.linear(%relu, @down.weight): f32[d0, 8]
return output=%linear_1
"""


def test_a_program_reads_like_this() -> None:
    assert to_text(program("norm-mlp")) == NORM_MLP


def test_several_graphs_are_headed_by_their_names() -> None:
    found = program("t5")
    text = to_text(found)
    assert text.startswith("graph encoder:\nweight @")
    assert "\ngraph decoder:\nweight @" in text
    assert graph_text(found, "decoder") in text


def test_a_tied_weight_is_printed_under_one_name() -> None:
    lines = to_text(program("tied-head")).splitlines()
    assert sum(line.startswith("weight @embed.weight") for line in lines) == 1
    assert not [line for line in lines if "@head.weight" in line]


def test_a_weight_that_is_read_twice_has_one_line() -> None:
    copy = program("norm-mlp").editable()
    relu = next(node for node in copy.graph.nodes if node.name == "relu")
    copy.weight_node(copy.graph, "up.bias", before=relu)
    assert to_text(copy) == to_text(program("norm-mlp"))


@pytest.mark.parametrize("name", ["norm-mlp", "tied-blocks", "llama"])
def test_a_copy_prints_the_same(name: str) -> None:
    copy = program(name).editable()
    assert to_text(copy) == to_text(program(name))
    assert fingerprint(copy) == fingerprint(program(name))


def test_the_fingerprint_reads_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = program("norm-mlp")
    known = fingerprint(found)
    for kind in (TensorWeight, FileWeight):
        monkeypatch.setattr(kind, "load", None)
    assert fingerprint(found) == known


def test_the_fingerprint_knows_values_names_and_calls() -> None:
    changed = [program("norm-mlp").editable() for _ in range(3)]
    value, name, call = changed
    other = TensorWeight(torch.zeros(16))
    value.weights = type(value.weights)(
        {n: other if n == "up.bias" else value.weights[n] for n in value.weights}
    )
    bias = next(node for node in name.graph.nodes if node.target == "up.bias")
    bias.target = name.add_weight("other", name.weight("up.bias"))
    norm = next(node for node in call.graph.nodes if node.name == "layer_norm")
    norm.args = (*norm.args[:4], 1e-6, False)
    prints = {fingerprint(each) for each in (program("norm-mlp"), *changed)}
    assert len(prints) == 4
