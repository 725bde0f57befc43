"""What the canonical form leaves of dtypes, weights, heads and sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import Attention, ComputedWeight, call_name
from modelathe.passes import Canonicalize
from support.feeds import feed
from support.formulas import Formula, cohere, made, rms
from support.models import MODELS, canonical, program
from support.numeric import rounding, worst_error
from support.views import calls, views

F = nn.functional


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_around_a_norm_go(dtype: torch.dtype) -> None:
    _, after = made(lambda m, x: m.gain * rms(x.float()).to(x.dtype), dtype)
    assert calls(after) == ["aten.rms_norm"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_so_they_do_where_the_gain_is_converted_too(dtype: torch.dtype) -> None:
    _, after = made(lambda m, x: (m.gain.float() * cohere(x.float())).to(x.dtype), dtype)
    assert calls(after) == ["aten.layer_norm"]


def test_a_bias_of_another_dtype_stays_a_sum() -> None:
    _, after = made(lambda m, x: F.linear(x, m.matrix).float() + m.shift.float(), torch.bfloat16)
    assert "aten.add.Tensor" in calls(after)


def test_a_gain_that_is_computed_in_float32_is_rounded_once() -> None:
    """Gemma writes ``norm(x.float()) * (1 + w.float())``: in a wide run, nothing is rounded."""
    before, after = made(
        lambda m, x: (rms(x.float()) * (1 + m.gain.float())).to(x.dtype), torch.bfloat16
    )
    inputs = feed(before)
    assert worst_error(after.run(inputs), before.run(inputs)) <= rounding(torch.bfloat16, 2)


def test_a_narrow_weight_in_the_middle_of_a_rule_does_not_narrow() -> None:
    """``(1 + w).half()`` is asked for in float64 and comes in float64."""
    before, after = made(lambda m, x: x * (1 + m.gain).half())
    (name,) = (name for name in after.weights if name.startswith("gain"))
    weight = after.weights[name]
    assert isinstance(weight, ComputedWeight)
    assert weight.dtype == torch.float16
    assert torch.equal(weight.load(torch.float64), 1 + before.weight("gain").load().double())
    assert torch.equal(weight.load(), (1 + before.weight("gain").load()).half())


def test_weights_computed_from_weights_are_computed_when_they_are_read() -> None:
    _, after = made(lambda m, x: x * (1 + m.gain).exp())
    (name,) = after.weights
    assert isinstance(after.weights[name], ComputedWeight)


def test_a_transposed_weight_is_one_weight_for_all_its_readers() -> None:
    _, after = made(lambda m, x: (x.view(-1, 8) @ m.matrix) + (x.view(-1, 8).relu() @ m.matrix))
    assert list(after.weights) == ["matrix.transposed"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "llama-bf16", "t5"])
def test_nothing_is_left_of_norms_gelus_and_flat_products(name: str) -> None:
    for graph in canonical(name).graphs.values():
        found = {call_name(node) for node in graph.nodes}
        assert not found & {"aten.rsqrt", "aten.tanh", "aten.addmm", "aten.mm", "aten.clone"}


@pytest.mark.parametrize("name", ["llama", "gemma3", "llama-bf16"])
def test_repeated_heads_become_grouped_attention(name: str) -> None:
    found = views(Attention, canonical(name))
    assert found
    for view in found:
        assert view.grouped
        parts = (view.query, view.key, view.value)
        assert [part.meta["val"].shape[1] for part in parts] == [4, 2, 2]


def test_heads_repeated_in_another_order_are_left_alone() -> None:
    def function(m: Formula, x: Tensor) -> Tensor:
        query = x.view(2, 3, 4, 2).transpose(1, 2)
        key = query[:, :2].repeat(1, 2, 1, 1)  # heads 0 1 0 1, and not 0 0 1 1
        return F.scaled_dot_product_attention(query, key, key)

    _, after = made(function)
    (view,) = (view for node in after.graph.nodes if (view := Attention.match(node)))
    assert not view.grouped


def test_each_size_is_asked_once() -> None:
    for name in ("llama", "t5"):
        for graph in canonical(name).graphs.values():
            sizes = [
                str(node.meta["val"])
                for node in graph.nodes
                if isinstance(node.meta.get("val"), torch.SymInt)
            ]
            assert len(sizes) == len(set(sizes))


@pytest.mark.parametrize("name", MODELS)
def test_remarks_say_what_was_done(name: str) -> None:
    result = Canonicalize()(program(name))
    changed = {graph for graph in result.program.graphs if result.modified}
    assert {remark.where for remark in result.remarks} <= changed
    assert all(remark.message[0].isdigit() for remark in result.remarks)
