"""Gain and bias of a norm move into its readers, or stay with a reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import Linear, Norm, Program, TensorWeight
from modelathe.passes import FoldNorms, Pipeline, Remark
from support.feeds import feed
from support.models import canonical, context, module, program
from support.numeric import EXACT, worst_error
from support.small import captured
from support.views import views

F = nn.functional


def kinds(remarks: tuple[Remark, ...]) -> list[str]:
    return [str(remark) for remark in remarks]


def assert_exact(before: Program, after: Program) -> None:
    for graph in before.graphs:
        inputs = feed(before, graph)
        wide = [each.run(inputs, graph, dtype=torch.float64) for each in (after, before)]
        assert worst_error(*wide) <= EXACT


def test_weights_are_the_products_rounded_once() -> None:
    before = program("norm-linears")
    after = FoldNorms()(before).program
    state = {
        name: value.detach().double() for name, value in module("norm-linears").state_dict().items()
    }
    gain, shift = state["norm.weight"], state["norm.bias"]
    left, right = views(Linear, after)
    for linear, name in ((left, "left"), (right, "right")):
        weight = (state[f"{name}.weight"] * gain).float()
        assert torch.equal(after.weight(linear.weight).load(), weight)
        bias = state[f"{name}.weight"] @ shift + state.get(f"{name}.bias", torch.zeros(8))
        assert linear.bias is not None
        assert torch.equal(after.weight(linear.bias).load(), bias.float())
    (norm,) = views(Norm, after)
    assert (norm.gain, norm.bias, norm.eps) == (None, None, 1e-5)


def test_a_norm_without_a_bias_adds_none() -> None:
    after = FoldNorms()(canonical("llama")).program
    assert all(linear.bias is None for linear in views(Linear, after))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "llama-bf16", "vit", "t5"])
def test_every_norm_in_front_of_a_linear_is_folded(name: str) -> None:
    result = FoldNorms()(canonical(name))
    left = [norm for norm in views(Norm, result.program) if norm.gain is not None]
    missed = [remark for remark in result.remarks if remark.kind == "missed"]
    assert {remark.where for remark in missed} == {norm.node.name for norm in left}
    assert len(left) < len(views(Norm, canonical(name)))


def test_a_bias_is_not_an_input_of_the_next_fold() -> None:
    """Two norms in a row through two linears: each weight is folded with its own norm."""

    def build() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))

    before = captured(build)
    result = FoldNorms()(before)
    assert [remark.kind for remark in result.remarks] == ["applied", "applied"]
    assert_exact(before, result.program)


class Rows(nn.Module):
    """The linear reads one position of the norm, as a classifier's head does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(x)[:, 0])
        return result


def test_moving_rows_does_not_matter() -> None:
    before = captured(Rows, 2, 3, 8)
    result = FoldNorms()(before)
    assert [remark.kind for remark in result.remarks] == ["applied"]
    assert_exact(before, result.program)


def test_a_tied_head_can_be_untied_on_demand() -> None:
    before = program("tied-head")
    result = FoldNorms(untie=True)(before)
    assert kinds(result.remarks) == [
        "applied: layer_norm: gain and bias folded into %linear",
        "applied: linear: untied head from %embedding: 512 bytes",
    ]
    assert_exact(before, result.program)
    assert "embed.weight" in result.program.weights


class OneWeight(nn.Module):
    """One weight, read behind two norms; the norms may have different gains."""

    def __init__(self, alike: bool) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        if alike:
            self.second = self.first
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.up(self.first(x)) + self.up(self.second(x + 1))
        return result


def test_a_shared_weight_stays_shared_where_all_readers_have_one_gain() -> None:
    before = captured(lambda: OneWeight(True))
    result = FoldNorms()(before)
    assert [remark.kind for remark in result.remarks] == ["applied", "applied"]
    left, right = views(Linear, result.program)
    assert left.weight.target == right.weight.target
    assert left.bias is not None
    assert right.bias is not None
    assert left.bias.target == right.bias.target
    assert_exact(before, result.program)


def test_a_shared_weight_behind_two_gains_is_refused_or_untied() -> None:
    before = captured(lambda: OneWeight(False))
    result = FoldNorms()(before)
    assert [remark.kind for remark in result.remarks] == ["missed", "missed"]
    assert "reads another norm; untie=true to force" in result.remarks[0].message
    forced = FoldNorms(untie=True)(before)
    assert forced.modified
    assert_exact(before, forced.program)


def test_bfloat16_weights_are_folded_in_float64() -> None:
    before = canonical("llama-bf16")
    after = FoldNorms()(before).program
    folded = [name for name in after.weights if name.endswith(".folded")]
    assert len(folded) == 2 * 5 + 1
    name = "model.layers.0.self_attn.q_proj.weight"
    weight, gain = (
        before.weight(key).load().double()
        for key in (name, "model.layers.0.input_layernorm.weight")
    )
    found = after.weight(f"{name}.folded")
    assert torch.equal(found.load(torch.float64), weight * gain)
    assert torch.equal(found.load(), (weight * gain).bfloat16())
    assert_exact(before, after)


def test_nothing_is_computed_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    before = canonical("llama")
    monkeypatch.setattr(TensorWeight, "load", None)
    assert FoldNorms()(before).modified


def test_a_pipeline_measures_next_to_nothing() -> None:
    result = Pipeline([FoldNorms()], context=context())(program("llama"))
    error = result.steps[-1].measured.error
    assert error is not None
    assert error <= EXACT


def test_gains_written_one_plus_w_are_folded_whole() -> None:
    before = canonical("gemma3")
    after = FoldNorms()(before).program
    state = {name: value.double() for name, value in module("gemma3").state_dict().items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    gain = 1 + state["model.layers.0.input_layernorm.weight"]
    found = after.weights[f"{name}.folded"].load(torch.float64)
    assert torch.equal(found, state[name] * gain)


def test_norms_of_queries_and_keys_are_left_alone() -> None:
    result = FoldNorms()(canonical("gemma3"))
    said = [r for r in result.remarks if "normalises queries or keys" in r.message]
    assert len(said) == 2 * 3
    assert {remark.kind for remark in said} == {"missed"}


def test_a_program_without_norms_says_so() -> None:
    result = FoldNorms()(captured(lambda: nn.Linear(8, 8)))
    assert kinds(result.remarks) == ["missed: main: gains: no norm has a gain or a bias"]
