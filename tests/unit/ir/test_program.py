"""A program is a value: copies share tensors and nothing else."""

from __future__ import annotations

import pytest
import torch

from modelathe.ir import (
    CaptureError,
    Linear,
    Signature,
    TensorWeight,
    fingerprint,
    insert_call,
    parameter_count,
    stored_bytes,
    verify,
)
from modelathe.ir.capture import replace_origin
from support.feeds import feed
from support.models import program

aten = torch.ops.aten


def test_editing_a_copy_leaves_the_original_alone() -> None:
    original = program("tied-blocks")
    known = fingerprint(original), dict(original.config), dict(original.signatures)
    copy = original.editable()
    copy.add_weight("new", torch.ones(1))
    copy.weights.aliases.clear()
    copy.config["vocab_size"] = 1
    copy.signatures.clear()
    for node in copy.graph.nodes:
        node.meta.pop("val", None)
    copy.graph.erase_node(copy.graph.output_node())
    assert (fingerprint(original), original.config, original.signatures) == known
    verify(original)


def test_a_copy_shares_its_tensors() -> None:
    original, copy = program("norm-mlp"), program("norm-mlp").editable()
    assert all(copy.weights[name] is original.weights[name] for name in original.weights)


def test_a_new_call_has_a_type_and_a_place() -> None:
    copy = program("tied-blocks").editable()
    node = next(node for node in copy.graph.nodes if Linear.match(node))
    scale = copy.weight_node(copy.graph, copy.add_weight("scale", torch.ones(8)), before=node)
    call = insert_call(copy.graph, aten.mul.Tensor, (node.args[0], scale), before=node, like=node)
    node.args = (call, *node.args[1:])
    verify(copy)
    assert str(call.meta["val"].shape) == str(node.meta["val"].shape)
    assert call.meta["custom"] == node.meta["custom"]
    assert [n.name for n in copy.graph.nodes].index(call.name) == (
        [n.name for n in copy.graph.nodes].index(node.name) - 1
    )


def test_cleaning_drops_what_nobody_reads() -> None:
    copy = program("tied-head").editable()
    linear = next(node for node in copy.graph.nodes if node.name == "linear")
    copy.add_weight("unread", torch.ones(3))
    result = copy.graph.output_node()
    result.args = ((linear.args[0],),)
    copy.clean()
    names = {node.name for node in copy.graph.nodes if node.op == "call_function"}
    assert names == {"embedding", "layer_norm"}
    assert set(copy.weights) == {"norm.weight", "norm.bias", "embed.weight"}


def test_cleaning_keeps_inputs_that_nobody_reads() -> None:
    copy = program("norm-mlp").editable()
    (source,) = copy.graph.find_nodes(op="placeholder")
    copy.graph.output_node().args = ((source,),)
    copy.clean()
    assert [node.op for node in copy.graph.nodes] == ["placeholder", "output"]


def test_a_signature_can_lose_and_rename_entries() -> None:
    signature = Signature(("x", "past.1"), ("y", "present.1"), {"x": ("b",), "past.1": ("b", 2)})
    assert signature.without({"x"}, {"y"}) == Signature(
        ("past.1",), ("present.1",), {"past.1": ("b", 2)}
    )
    renamed = signature.renamed({"past.1": "past.0", "present.1": "present.0"})
    assert renamed.inputs == ("x", "past.0")
    assert renamed.outputs == ("y", "present.0")
    assert renamed.dims["past.0"] == ("b", 2)


def test_sizes_count_each_weight_once() -> None:
    found = program("tied-head")  # embedding 16 x 8, norm 8 + 8
    assert parameter_count(found) == 16 * 8 + 16
    assert stored_bytes(found) == 4 * (16 * 8 + 16)


def test_the_program_remembers_its_passes() -> None:
    found = program("norm-mlp").after("first").after("second{n=1}")
    assert found.origin.passes == ("first", "second{n=1}")
    assert program("norm-mlp").origin.passes == ()


def test_the_untouched_program_is_at_hand() -> None:
    found = program("norm-mlp").after("first")
    assert fingerprint(found.origin.reference()) == fingerprint(program("norm-mlp"))


def test_without_a_source_there_is_no_untouched_program() -> None:
    found = replace_origin(program("norm-mlp"), recapture=None)
    with pytest.raises(CaptureError, match="is not available") as caught:
        found.origin.reference()
    assert "--against" in caught.value.remedy


def test_a_weight_can_be_named_or_pointed_at() -> None:
    found = program("norm-mlp")
    node = next(node for node in found.graph.nodes if node.target == "up.weight")
    assert found.weight(node) is found.weight("up.weight")
    assert isinstance(found.weight(node), TensorWeight)


def test_weights_may_be_changed_one_name_at_a_time() -> None:
    copy = program("norm-mlp").editable()
    node = next(node for node in copy.graph.nodes if node.target == "down.weight")
    node.target = copy.add_weight("down.weight", copy.weight(node).load() * 2)
    assert node.target == "down.weight_1"
    inputs = feed(copy)
    doubled = copy.run(inputs)["output"]
    assert torch.equal(doubled, program("norm-mlp").run(inputs)["output"] * 2)
