"""Whole graphs as ONNX: what ONNX Runtime computes is what the program computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from modelathe.backends.onnx.emit import emit
from modelathe.ir import LoweringError, Program, TensorWeight, Weight
from support.feeds import SHAPES, feed
from support.models import canonical, program
from support.numeric import relative_error
from support.onnx_models import emitted, opened, operators, ran

LIMIT = 2e-5  # float32: a few hundred roundings in a row, sums in another order
NAMES = ("hand-written", "tied-blocks", "llama", "gpt2", "gemma3", "bert", "albert", "vit", "t5")
DECODERS = ("llama", "gpt2", "gemma3")


def _agree(made: Program, graph: str, session: Any, **sizes: int) -> None:
    inputs = feed(made, graph, **sizes)
    expected, found = made.run(inputs, graph), ran(session, inputs)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert relative_error(value, found[name]) < LIMIT, (name, sizes)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_program_at_every_shape(name: str, opset: int) -> None:
    made = canonical(name)
    for graph in made.graphs:
        session = opened(emitted(made, graph, opset=opset))
        for batch, sequence, past in SHAPES:
            _agree(made, graph, session, batch=batch, sequence=sequence, past=past)


@pytest.mark.parametrize("name", DECODERS)
def test_graphs_that_were_not_canonicalised_are_translated_too(name: str) -> None:
    made = program(name)
    _agree(made, "main", opened(emitted(made)), batch=2, sequence=4, past=3)


@pytest.mark.parametrize("name", [*DECODERS, "bert"])
def test_pads_change_nothing_where_the_mask_is_one(name: str) -> None:
    made, pads = canonical(name), 3
    inputs = feed(made, batch=2, sequence=7, past=0, pads=pads)
    expected, found = made.run(inputs), ran(opened(emitted(made)), inputs)
    (first, *_) = expected
    keep = inputs["attention_mask"].bool()
    assert relative_error(expected[first][keep], found[first][keep]) < LIMIT


def test_a_left_padded_row_gives_the_logits_of_the_unpadded_text() -> None:
    made = canonical("gpt2")  # learned positions: rotary ones would hide a wrong position
    session = opened(emitted(made))
    padded = feed(made, batch=2, sequence=7, past=0, pads=3)
    alone = {name: value[:1] for name, value in padded.items()}
    for name in ("input_ids", "attention_mask", "position_ids"):
        alone[name] = alone[name][:, 3:].contiguous()
    whole, short = ran(session, padded)["logits"], ran(session, alone)["logits"]
    assert relative_error(short[0], whole[0, 3:]) < LIMIT


def test_norms_rotary_and_attention_are_single_nodes_and_the_cache_is_joined_inside() -> None:
    model = emitted(canonical("llama"))
    counts = operators(model)
    blocks = 2
    assert counts["Attention"] == blocks
    assert counts["RotaryEmbedding"] == 2 * blocks
    assert counts["RMSNormalization"] == 2 * blocks + 1
    joined = [
        value.name for node in model.graph if node.op_type == "Concat" for value in node.inputs
    ]
    assert not [name for name in joined if name.startswith("past_key_values")]


def test_repeated_heads_are_read_as_they_were_before_they_were_repeated() -> None:
    model = emitted(program("llama"))  # canonicalize would have removed the repetition
    (attention, *_) = [node for node in model.graph if node.op_type == "Attention"]
    assert attention.inputs[1].shape[1] == 2  # key heads
    assert not [node for node in model.graph if node.op_type == "Expand" and len(node.inputs) > 4]


def test_a_tied_weight_is_one_initializer() -> None:
    model = emitted(canonical("gpt2"))
    vocabulary = [v for v in model.graph.initializers.values() if 48 in tuple(v.shape)]
    assert [value.name for value in vocabulary] == ["transformer.wte.weight"]


def test_symbolic_sizes_have_the_names_of_the_signature() -> None:
    model = emitted(canonical("llama"))
    shapes = {value.name: [str(d) for d in value.shape] for value in model.graph.inputs}
    assert shapes["attention_mask"] == ["batch", "past + sequence"]
    results = {value.name: [str(d) for d in value.shape] for value in model.graph.outputs}
    assert results["present.0.key"][2] == "past + sequence"


class _Unread(Weight):
    """A weight that must not be loaded."""

    def __init__(self, weight: Weight) -> None:
        self.shape, self.dtype = weight.shape, weight.dtype

    @property
    def fingerprint(self) -> str:
        return "unread"

    def load(self, dtype: torch.dtype | None = None) -> Tensor:
        raise AssertionError("a weight was read")


def test_weights_are_not_read_before_the_file_is_written() -> None:
    made = canonical("llama")
    unread = {name: _Unread(made.weights[name]) for name in made.weights}
    model = emit(made.graph, made.signature, unread)
    assert len(model.graph.initializers) >= len(unread)


def test_a_call_without_a_translation_is_named() -> None:
    made = program("norm-mlp").editable()
    (output,) = made.graph.find_nodes(op="output")
    (last,) = output.args[0]
    with made.graph.inserting_before(output):
        odd = made.graph.call_function(torch.ops.aten.kthvalue.default, (last, 2))
        odd.meta["val"] = (last.meta["val"], last.meta["val"])
        first = made.graph.call_function(fx.node.operator.getitem, (odd, 0))
        first.meta["val"] = last.meta["val"]
    output.args = ((first,),)
    with pytest.raises(
        LoweringError, match=r"%kthvalue\w*: aten.kthvalue.default has no translation"
    ):
        emitted(made)


def test_a_keyword_that_a_translation_would_ignore_is_named() -> None:
    made = program("norm-mlp").editable()
    (output,) = made.graph.find_nodes(op="output")
    (last,) = output.args[0]
    with made.graph.inserting_before(output):
        call = torch.ops.aten.bernoulli.p
        odd = made.graph.call_function(call, (last, 0.5), {"generator": 3})
        odd.meta["val"] = last.meta["val"]
    output.args = ((odd,),)
    with pytest.raises(
        LoweringError, match=r"%bernoulli\w*: .* has no translation with generator="
    ):
        emitted(made)
    odd.kwargs = {"generator": None}
    assert operators(emitted(made))["RandomUniformLike"]


def test_an_output_that_is_an_input_or_a_weight_or_given_twice_has_its_own_name() -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    mode = program("norm-mlp").graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode
    with mode:
        x.meta["val"], w.meta["val"] = torch.empty(3), torch.empty(3)
    total = graph.call_function(torch.ops.aten.add.Tensor, (x, w))
    total.meta["val"] = x.meta["val"]
    graph.output((x, w, total, total))
    from modelathe.ir import Signature

    names = ("a", "b", "c", "d")
    signature = Signature(("x",), names, {"x": (3,)})
    model = emit(graph, signature, {"w": TensorWeight(torch.ones(3))})
    found = ran(opened(model), {"x": torch.zeros(3)})
    assert {name: float(found[name][0]) for name in names} == {"a": 0, "b": 1, "c": 1, "d": 1}
