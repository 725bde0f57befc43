"""The inputs that checks run on, and the node that they blame."""

from __future__ import annotations

import pytest
import torch

from modelathe.ir import Linear, insert_call
from modelathe.passes.blame import first_wrong_node, place_of
from modelathe.passes.fidelity import EXACT, judge_rounding
from modelathe.passes.probes import probe, probes
from support.models import MODELS, WINDOW, canonical, program
from support.views import views

aten = torch.ops.aten


@pytest.mark.parametrize("name", MODELS)
def test_probes_fit_the_signature(name: str) -> None:
    found = canonical(name)
    graphs = set()
    for graph, inputs in probes(found):
        graphs.add(graph)
        assert set(inputs) == set(found.signatures[graph].inputs)
        found.run(inputs, graph)
    assert graphs == set(found.graphs)


def test_probes_have_a_cache_and_padding() -> None:
    given = [inputs for _, inputs in probes(canonical("llama"))]
    assert [g["past_key_values.0.key"].shape[2] for g in given] == [0, 7, 3]
    assert [int((g["attention_mask"] == 0).sum()) for g in given] == [0, 0, 2]
    assert given[2]["position_ids"][0].tolist() == [1, 2, 3, 4, 5, 6]
    assert given[2]["position_ids"][1].tolist() == [3, 4, 5, 6, 7, 8]
    assert given[0]["input_ids"].shape[1] > WINDOW


def test_whatever_indexes_a_table_is_random_and_in_range() -> None:
    inputs = probe(canonical("bert"), "main", batch=4, sequence=9)
    assert set(inputs["token_type_ids"].flatten().tolist()) == {0, 1}
    ids = probe(canonical("tied-head"), "main", batch=9, sequence=9)["ids"]
    assert 0 <= int(ids.min()) < int(ids.max()) < 16
    assert torch.equal(ids, probe(canonical("tied-head"), "main", batch=9, sequence=9)["ids"])


def test_blame_passes_over_what_readers_make_up_for() -> None:
    """Two edits that cancel, and one that does not: the third is named."""
    before, copy = canonical("norm-mlp"), canonical("norm-mlp").editable()
    up, down = views(Linear, copy)
    for view, factor, name in ((up, 2.0, "twice"), (down, 0.5, "half")):
        for part in (view.weight, view.bias) if view is up else (view.weight,):
            assert part is not None
            value = copy.weight(part).load() * factor
            node = copy.weight_node(copy.graph, copy.add_weight(name, value), before=view.node)
            view.node.replace_input_with(part, node)
    inputs = probe(before, "main", d0=3)
    assert first_wrong_node(before, copy, "main", inputs, torch.float64, EXACT) == ""
    judge_rounding(before, copy, "here")
    result = insert_call(
        copy.graph, aten.mul.Tensor, (down.node, 3), before=copy.graph.output_node(), like=down.node
    )
    copy.graph.output_node().args = ((result,),)
    found = first_wrong_node(before, copy, "main", inputs, torch.float64, EXACT)
    assert found == place_of(result)


def test_blame_sees_through_new_names() -> None:
    """After canonicalize most calls read nodes of other names; the wrong one is still found."""
    copy = canonical("llama").editable()
    node = [n for n in copy.graph.nodes if n.target is aten.rms_norm.default][2]
    node.args = (*node.args[:3], 1e-2)
    inputs = probe(program("llama"), "main", batch=2, sequence=5, past=0)
    found = first_wrong_node(program("llama"), copy, "main", inputs, torch.float64, EXACT)
    assert found == f"%{node.name} (aten.rms_norm of model.layers.1.input_layernorm)"


def test_where_nothing_is_wrong_nobody_is_blamed() -> None:
    before = canonical("norm-mlp")
    inputs = probe(before, "main", d0=3)
    assert first_wrong_node(before, before.editable(), "main", inputs, None, 0.0) == ""
