from __future__ import annotations

from typing import Any

import pytest
import torch

from modelathe.backends.sizes import program_sizes
from modelathe.ir import Linear, PassError, Program, QuantizedLinear, TensorWeight, path_of
from modelathe.ir.activations import RoundedActivations, rounded_activations
from modelathe.ir.sparse import outlier_sums
from modelathe.passes import (
    Canonicalize,
    FoldNorms,
    PassResult,
    QuantizeActivations,
    QuantizeWeights,
)
from modelathe.passes.quantization.ranges import fixed_codes
from support.feeds import feed
from support.models import canonical, context


def quantized(model: str, **options: Any) -> Program:
    options = {"bits": 8, "group_size": -1, "method": "rtn", **options}
    return QuantizeWeights(**options)(canonical(model), context()).program


def rounded(program: Program, **options: Any) -> PassResult:
    return QuantizeActivations(**options)(program, context())


def missed(result: PassResult) -> list[str]:
    return [remark.message for remark in result.remarks if remark.kind == "missed"]


def test_every_eligible_linear_reads_rounded_numbers_and_nothing_else_does() -> None:
    program = rounded(quantized("llama", head_bits=None)).program
    for node in program.graph.nodes:
        if linear := QuantizedLinear.match(node):
            assert RoundedActivations.match(linear.input)
        if linear := Linear.match(node):
            assert not RoundedActivations.match(linear.input)
    for view in rounded_activations(program.graph):
        assert all(QuantizedLinear.match(user) for user in view.node.users)


def test_linears_on_one_value_share_its_rounding() -> None:
    result = rounded(quantized("llama", head_bits=None))
    views = rounded_activations(result.program.graph)
    assert [len(view.node.users) for view in views] == [3, 1, 2, 1] * 2
    assert any("a step per token, for 3 linears" in str(remark) for remark in result.remarks)


def test_static_codes_cover_the_calibration_text() -> None:
    before = quantized("token-norm")
    program = rounded(before, mode="static", bits=7).program
    (view,) = rounded_activations(program.graph)
    assert view.scale is not None
    assert view.zero is not None
    values: dict[Any, Any] = {}
    windows = context().calibration_tokens(before).tokens
    program.run({"input_ids": windows}, observe=values.__setitem__)
    x, scale, zero = (values[part] for part in (view.input, view.scale, view.zero))
    assert float(scale) == pytest.approx(float(x.max() - x.min()) / 127, rel=1e-6)
    assert (values[view.node] - x).abs().max() <= scale * 0.5001 + (scale * 0.5)  # zero is rounded
    assert 0 < int(zero) < 127
    assert not program.weights.is_parameter(str(view.scale.target))


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 5.0), (-2.0, 0.0), (0.0, 0.0)])
def test_fixed_codes(bits: int, low: float, high: float) -> None:
    scale, zero = fixed_codes(low, high, bits)
    assert 0 <= int(zero) <= 2**bits - 1
    assert float(scale) > 0
    assert abs(-int(zero) * float(scale) - low) <= float(scale) / 2 + 1e-6


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 4}, "its weight has 4 bits"),
        ({"group_size": 8}, "its weight has groups of 8"),
        ({"ignore": ("down",)}, "its weight is not quantised"),
    ],
)
def test_a_linear_that_cannot_multiply_integers_is_missed(
    options: dict[str, Any], reason: str
) -> None:
    result = rounded(quantized("norm-mlp", **options))
    assert any(message.startswith(reason) for message in missed(result))


def test_a_group_that_is_the_whole_row_is_one_scale_a_row() -> None:
    assert not missed(rounded(quantized("norm-linears", group_size=8)))


def test_a_weight_that_an_embedding_shares_stays_one_tensor() -> None:
    result = rounded(quantized("tied-head"))
    assert missed(result) == ["its weight is an embedding's too, and would be stored a second time"]
    assert not result.modified


@pytest.mark.parametrize("model", ["norm-mlp", "conv-norms"])
def test_weights_that_are_not_quantised_yet_are_an_error(model: str) -> None:
    with pytest.raises(PassError, match="no linear has quantised weights") as error:
        rounded(canonical(model))
    assert error.value.remedy == "put quantize-weights{bits=8 group-size=-1} before it"


def test_what_comes_too_late_says_so() -> None:
    program = rounded(quantized("norm-mlp")).program
    weights = QuantizeWeights(bits=8, group_size=-1)(program)
    assert all("quantised to 8 bits already" in message for message in missed(weights))
    assert not weights.modified
    assert not FoldNorms()(program).modified
    assert not rounded(program).modified


def test_only_and_ignore() -> None:
    program = quantized("norm-linears")
    for options in ({"only": ("left",)}, {"ignore": ("right",)}):
        (view,) = rounded_activations(rounded(program, **options).program.graph)
        assert [path_of(user) for user in view.node.users] == ["left"]
    with pytest.raises(PassError, match="matches none of the 2 modules"):
        rounded(program, only=("up",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4}, "bits is 7 or 8, got 4"),
        ({"mode": "token"}, "mode is dynamic or static"),
        ({"only": "left"}, "only is a tuple of globs"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizeActivations(**options)


def test_calibration_values_that_are_not_finite_are_an_error() -> None:
    program = quantized("token-norm").editable()
    (bias,) = [name for name in program.weights if name.endswith("norm.bias")]
    program.weights.put(bias, TensorWeight(torch.full((8,), torch.inf)))
    with pytest.raises(PassError, match="is not finite on the calibration text"):
        QuantizeActivations(mode="static").run(program, context())


def test_a_model_that_reads_no_tokens_has_no_static_range() -> None:
    with pytest.raises(PassError, match="reads no tokens, so text gives no range"):
        rounded(quantized("norm-mlp"), mode="static")
    assert rounded(quantized("norm-mlp")).modified


@pytest.mark.parametrize("broken", ["unrounded", "other-step", "other-input"])
def test_a_broken_rewrite_is_found_out(broken: str) -> None:
    before = quantized("norm-linears")
    pass_ = QuantizeActivations()
    after = pass_.run(before.editable(), context()).program
    (view,) = rounded_activations(after.graph)
    if broken == "unrounded":
        first = next(iter(view.node.users))
        first.replace_input_with(view.node, view.input.all_input_nodes[0])
    elif broken == "other-step":
        with after.graph.inserting_after(view.node):
            twice = after.graph.call_function(torch.ops.aten.mul.Tensor, (view.node, 1.5))
        twice.meta = dict(view.node.meta)
        view.node.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
    else:
        view.node.replace_input_with(view.input, next(iter(view.input.all_input_nodes)))
    with pytest.raises(PassError, match="differs where nothing is rounded"):
        pass_.ensures(before, after)


def test_a_number_that_moves_too_far_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelathe.passes.quantization import quantize_activations as module

    before = quantized("norm-linears")
    after = rounded(before).program
    plain = module.dynamic_step
    monkeypatch.setattr(module, "dynamic_step", lambda x, bits: plain(x, bits) / 2)
    with pytest.raises(PassError, match="moved by more than half a step"):
        QuantizeActivations().ensures(before, after)


def test_outputs_stay_close() -> None:
    before = quantized("bert")
    after = rounded(before).program
    inputs = feed(before, sequence=8)
    expected, found = before.run(inputs), after.run(inputs)
    value, moved = (each["last_hidden_state"] for each in (expected, found))
    share = (moved - value).square().mean() / value.square().mean()
    assert 1e-8 < share < 1e-3  # 8 bits: steps of 1 / 127 of a token's largest number


def test_canonicalising_again_leaves_it_alone() -> None:
    program = rounded(quantized("bert")).program
    assert not Canonicalize()(program).modified


@pytest.mark.parametrize("kind", ["structured", "unstructured"])
def test_outliers_stay_outliers_and_read_what_is_not_rounded(kind: Any) -> None:
    before = quantized(
        "llama",
        method="quantease",
        iterations=2,
        outliers=0.1,
        outlier_kind=kind,
        only=("layers.0",),
    )
    result = rounded(before, only=("layers.0",))
    assert not missed(result)
    sums, after = (outlier_sums(program.graph) for program in (before, result.program))
    assert len(sums) == len(after) == 7
    assert all(RoundedActivations.match(one.product.input) for one in after)
    assert [one.beside.name for one in after] == [one.beside.name for one in sums]
    assert program_sizes(result.program) == program_sizes(before)
    again = QuantizeWeights(bits=8, group_size=-1, method="rtn", head_bits=None)
    assert len(outlier_sums(again(result.program, context()).program.graph)) == 7
