"""Converting a program is rounding its weights and computing in another dtype, nothing else."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from modelathe.ir import (
    PassError,
    Program,
    TensorWeight,
    fingerprint,
    kept_calls,
    main_dtype,
    parameter_count,
    to_text,
    verify,
)
from modelathe.passes import ConvertDtype, Pipeline, QuantizeWeights
from support.feeds import decoder_outputs, feed, plain_outputs
from support.models import canonical, context, module, program
from support.numeric import assert_same_bits, relative_error, rounding

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def convert(found: Program, to: Any, *keep: Any) -> Program:
    return ConvertDtype(to=to, keep=keep)(found).program


@functools.cache
def canonical_in(to: str, name: str, *keep: str) -> Program:
    """Return the canonical program of a model, converted once."""
    return convert(canonical(name), to, *keep)


def values(found: Program, inputs: dict[str, Tensor], graph: str = "main") -> dict[str, Tensor]:
    """Run on inputs of another dtype."""
    types = {str(n.target): n.meta["val"].dtype for n in placeholders(found, graph)}
    return found.run({name: v.to(types[name]) for name, v in inputs.items()}, graph)


def placeholders(found: Program, graph: str = "main") -> list[Any]:
    return list(found.graphs[graph].find_nodes(op="placeholder"))


@pytest.mark.parametrize("to", ["float16", "bfloat16"])
def test_gpt2_has_the_bits_of_the_model_in_that_dtype(to: str) -> None:
    model = copy.deepcopy(module("gpt2")).to(DTYPES[to])
    found = convert(program("gpt2"), to)
    inputs = feed(found, sequence=6, past=3)
    assert {v.dtype for n, v in inputs.items() if "past" in n} == {DTYPES[to]}
    assert_same_bits(found.run(inputs), decoder_outputs(model, inputs))


def test_vit_has_the_bits_of_the_model_in_that_dtype() -> None:
    model = copy.deepcopy(module("vit")).to(torch.bfloat16)
    found = convert(program("vit"), "bfloat16")
    inputs = feed(found)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert_same_bits(found.run(inputs), plain_outputs(model, inputs, found.signature.outputs))


def test_a_bfloat16_model_in_float32_has_the_bits_of_its_float32_self() -> None:
    model = copy.deepcopy(module("llama-bf16")).float()
    found = convert(program("llama-bf16"), "float32")
    assert "bf16" not in to_text(found)
    inputs = feed(found, sequence=6, past=3)
    assert_same_bits(found.run(inputs), decoder_outputs(model, inputs))


@pytest.mark.parametrize("to", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "t5", "tied-blocks", "hand-written"])
def test_outputs_move_by_rounding_only(name: str, to: str) -> None:
    found = canonical_in(to, name)
    for graph in found.graphs:
        inputs = feed(canonical(name), graph, sequence=6, past=4)
        expected = canonical(name).run(inputs, graph)
        for output, value in values(found, inputs, graph).items():
            assert value.dtype == DTYPES[to]
            assert relative_error(expected[output], value) <= rounding(DTYPES[to])


def test_each_weight_is_the_old_one_rounded() -> None:
    before, after = canonical("gpt2"), canonical_in("bfloat16", "gpt2")
    assert len(after.weights) == len(before.weights)
    for name in before.weights:
        old, new = before.weights[name].load(), after.weights[f"{name}.bfloat16"]
        assert new.dtype == torch.bfloat16
        assert torch.equal(new.load(), old.bfloat16())
        # a check in a wider dtype sees the rounding too
        assert torch.equal(new.load(torch.float64), old.bfloat16().double())


def test_a_tied_weight_stays_one_weight() -> None:
    before, after = canonical("gpt2"), canonical_in("float16", "gpt2")
    assert before.weights.aliases
    assert after.weights.aliases == {
        alias: f"{name}.float16" for alias, name in before.weights.aliases.items()
    }


def test_positions_stay_in_float32_until_they_meet_an_activation() -> None:
    found = canonical_in("bfloat16", "llama")
    assert found.weights["model.rotary_emb.inv_freq"].dtype == torch.float32
    inputs = feed(canonical("llama"), sequence=2)
    inputs["position_ids"] = torch.tensor([[256, 257], [258, 259]])
    expected = canonical("llama").run(inputs)["present.0.key"]
    error = relative_error(expected, values(found, inputs)["present.0.key"])
    assert error <= rounding(torch.bfloat16, steps=8)


def test_buckets_of_relative_positions_stay_whole() -> None:
    """T5 takes logarithms of distances to number them: one step off is another bias."""
    text = to_text(canonical_in("bfloat16", "t5"))
    logs = [line for line in text.splitlines() if "aten.log(" in line]
    assert logs
    assert all(line.split(": ")[-1].startswith("f32") for line in logs)


def test_what_a_model_computes_in_float32_on_purpose_stays() -> None:
    found = program("llama-bf16")
    wide = [node.name for node in found.graph.nodes if _is(node, torch.float32)]
    assert wide
    after = convert(found, "float16")
    assert [node.name for node in after.graph.nodes if _is(node, torch.float32)] == wide
    assert not any(_is(node, torch.bfloat16) for node in after.graph.nodes)


def _is(node: Any, dtype: torch.dtype) -> bool:
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, Tensor) and value.dtype == dtype


@pytest.mark.parametrize(("to", "limit"), [("float16", "-65504.0"), ("bfloat16", "-3.3895")])
def test_constants_of_masks_stay_finite(to: str, limit: str) -> None:
    assert "-3.4028" in to_text(canonical("t5"))
    found = canonical_in(to, "t5")
    assert "-3.4028" not in to_text(found)
    assert limit in to_text(found)
    inputs = feed(found, "decoder", sequence=4, past=3, pads=2)
    assert all(bool(v.isfinite().all()) for v in found.run(inputs, "decoder").values())


@pytest.mark.parametrize("keep", ["norms", "softmax"])
@pytest.mark.parametrize("name", ["llama", "bert", "llama-bf16"])
def test_kept_calls_compute_in_float32_and_no_others(name: str, keep: Any) -> None:
    to = "float16"
    plain, found = canonical_in(to, name), canonical_in(to, name, keep)
    kept = kept_calls(found, keep)
    assert len(kept) == len(kept_calls(canonical(name), keep)) > 0
    assert {node.meta["val"].dtype for node in kept} == {torch.float32}
    for node in kept:
        types = {_type(source) for source in node.all_input_nodes}
        assert types <= {torch.float32, torch.bool}
    types_of = {node.name: _type(node) for node in plain.graph.nodes}
    names = {node.name for node in kept}
    changed = {
        node.name
        for node in found.graph.nodes
        if node.name in types_of and _type(node) != types_of[node.name]
    }
    assert {n for n in changed if not n.startswith("_to_copy") and "weight" not in n} <= names


def test_a_norm_that_is_kept_keeps_its_gain() -> None:
    found = canonical_in("float16", "llama", "norms")
    gains = [name for name in canonical("llama").weights if "norm" in name]
    assert [name for name in found.weights if "norm" in name] == gains


def _type(node: Any) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def test_keeping_norms_brings_outputs_closer() -> None:
    inputs = feed(canonical("llama"), sequence=12, batch=4)
    expected = canonical("llama").run(inputs)["logits"]
    errors = [
        float(
            (values(canonical_in("bfloat16", "llama", *keep), inputs)["logits"] - expected)
            .double()
            .norm()
        )
        for keep in ((), ("norms", "softmax"))
    ]
    assert errors[1] < errors[0]


def test_the_input_is_untouched_and_a_second_run_does_nothing() -> None:
    found = canonical("gpt2")
    before = fingerprint(found)
    after = convert(found, "bfloat16")
    assert fingerprint(found) == before
    again = ConvertDtype(to="bfloat16")(after)
    assert [str(remark) for remark in again.remarks] == ["missed: program: is in bfloat16 already"]
    assert fingerprint(again.program) == fingerprint(after)


def test_there_and_back_is_rounding() -> None:
    found = convert(canonical_in("float16", "gpt2"), "float32")
    for name in canonical("gpt2").weights:
        old = canonical("gpt2").weights[name].load()
        assert torch.equal(found.weights[f"{name}.float32"].load(), old.half().float())


def test_the_configuration_says_the_dtype() -> None:
    assert canonical_in("bfloat16", "gpt2").config["dtype"] == "bfloat16"


def test_a_program_keeps_its_symbolic_sizes() -> None:
    found = canonical_in("float16", "t5")
    verify(found)
    assert found.signatures == canonical("t5").signatures
    for shape in ({"batch": 3, "sequence": 4, "past": 2}, {"batch": 1, "sequence": 1, "past": 0}):
        found.run(feed(found, "decoder", **shape), "decoder")


def test_codes_of_quantised_weights_stay_and_scales_follow() -> None:
    quantize = QuantizeWeights(bits=4, group_size=8, embedding_bits=8)
    quantised = quantize(canonical("llama"), context()).program
    found = convert(quantised, "bfloat16")
    assert main_dtype(quantised) == torch.float32
    kinds = {name: found.weights[name].dtype for name in found.weights}
    assert {d for n, d in kinds.items() if "scales" in n} == {torch.bfloat16}
    assert {d for n, d in kinds.items() if n.endswith((".codes", ".zeros"))} == {torch.uint8}
    inputs = feed(quantised, sequence=4)
    expected = quantised.run(inputs)["logits"]
    error = relative_error(expected, values(found, inputs)["logits"])
    assert error <= rounding(torch.bfloat16)


@pytest.mark.parametrize("name", ["gemma3", "vit", "llama-bf16"])
def test_the_pipeline_accepts_it(name: str) -> None:
    steps = Pipeline([ConvertDtype(to="float16", keep=("norms",))], context())(program(name)).steps
    assert "weights converted to float16" in str(steps[-1].remarks[-1])
    assert steps[-1].measured.known()


def test_what_was_no_parameter_becomes_none() -> None:
    before = canonical("llama")
    assert parameter_count(canonical_in("bfloat16", "llama")) == parameter_count(before)


def test_what_nothing_answers_to_is_said() -> None:
    remarks = ConvertDtype(to="float16", keep=("softmax",))(canonical("norm-mlp")).remarks
    assert str(remarks[0]) == "missed: keep=softmax: no call is one of those"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"to": "int8"}, "to is one of"), ({"to": "float16", "keep": ("gelu",)}, "norms and softmax")],
)
def test_bad_options_are_refused_at_once(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvertDtype(**options)


def another_weight(after: Program) -> None:
    name = "transformer.h.0.attn.c_attn.weight.bfloat16"
    name = next(n for n in after.weights if n.startswith("transformer.h.0.attn.c_attn"))
    value = TensorWeight(after.weights[name].load() * 1.01)
    for node in after.graph.find_nodes(op="get_attr", target=name):
        node.target = after.add_weight(f"{name}.other", value)
    after.clean()


def two_swapped(after: Program) -> None:
    pair = [n for n in after.graph.find_nodes(op="get_attr") if ".ln_1.weight" in str(n.target)]
    pair[0].target, pair[1].target = pair[1].target, pair[0].target


def other_scale(after: Program) -> None:
    attentions = after.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    attentions[0].kwargs = {**attentions[0].kwargs, "scale": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_weight, "is not a conversion"),
        (two_swapped, "with the old weights in float64, first wrong at"),
        (other_scale, "first wrong at %scaled_dot_product_attention"),
    ],
)
def test_a_wrong_result_is_caught(change: Any, message: str) -> None:
    before = canonical("gpt2")
    after = convert(before, "bfloat16").editable()
    change(after)
    with pytest.raises(PassError, match=message):
        ConvertDtype(to="bfloat16").ensures(before, after)
