"""Text, weights and options of which nothing good can be made: an error, or a remark."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from modelathe.ir import PassError, Program, QuantizedLinear, TensorWeight
from modelathe.passes import PassContext, QuantizeWeights
from modelathe.passes.data import TokenWindows
from modelathe.passes.quantization.store import Stored
from support.models import canonical, context, quantizer
from support.tiny import tiny

few = PassContext(calibration=TokenWindows.of(torch.arange(8).view(1, 8), "test"))


def restored(program: Program) -> list[Tensor]:
    """Return what the codes of all quantised linears stand for."""
    calls = filter(None, map(QuantizedLinear.match, program.graph.nodes))
    return [Stored.of(program, call).load().dequantize() for call in calls]


def test_an_input_that_is_always_zero_is_rounded() -> None:
    program = canonical("llama")
    gain = next(n for n in program.weights if n.endswith("layers.0.input_layernorm.weight"))
    value = program.weights[gain].load().clone()
    value[3] = 0
    changed = replace(program, weights=program.weights.copy())
    changed.weights.put(gain, TensorWeight(value))
    result = quantizer(only=("layers.0.self_attn",))(changed, context())
    assert all(weight.isfinite().all() for weight in restored(result.program))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_named(bad: float) -> None:
    program = canonical("llama")
    gain = next(n for n in program.weights if n.endswith("layers.1.input_layernorm.weight"))
    changed = replace(program, weights=program.weights.copy())
    changed.weights.put(gain, TensorWeight(program.weights[gain].load() * bad))
    with pytest.raises(PassError, match="is not finite on the calibration text") as caught:
        quantizer().run(changed.editable(), context())
    assert "another calibration text" in caught.value.remedy


@pytest.mark.parametrize("method", ["gptq", "quantease", "auto"])
def test_fewer_tokens_than_channels_are_damped_and_said_to_say_little(method: Any) -> None:
    result = quantizer(method=method, only=("layers.0",))(canonical("llama"), few)
    told = [str(r) for r in result.remarks if "8 tokens say little about" in str(r)]
    assert len(told) == 7
    assert all("missed" in text and "give more text" in text for text in told)
    assert all(weight.isfinite().all() for weight in restored(result.program))


def test_moments_that_cannot_be_used_undamped_are_an_error_with_a_remedy() -> None:
    undamped = quantizer(method="gptq", damping=0.0, only=("layers.0.self_attn",))
    with pytest.raises(PassError, match=r"@.*_proj.weight: .*not positive definite") as caught:
        undamped(canonical("llama"), few)
    assert "damping=0.1" in caught.value.remedy


def test_a_group_that_is_larger_than_a_row_is_an_error_with_a_remedy() -> None:
    with pytest.raises(PassError, match=r"32 wide, which group-size=128 does not") as info:
        QuantizeWeights(group_size=128)(tiny(1))
    assert "group-size=-1" in info.value.remedy


def test_a_model_that_reads_no_text_is_refused_or_rounded_to_nearest() -> None:
    with pytest.raises(PassError, match="reads no tokens"):
        quantizer(method="gptq")(canonical("norm-mlp"), context())
    result = quantizer()(canonical("norm-mlp"), context())
    assert any("applied: quantize-weights: rtn" in str(remark) for remark in result.remarks)
