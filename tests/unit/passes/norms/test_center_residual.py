"""LayerNorms become RMSNorms where the residual stream can be kept without a mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import Norm, Program
from modelathe.passes import CenterResidual, FoldNorms, QuantizeWeights
from support.exactness import checked
from support.models import MODELS, canonical, module
from support.small import small
from support.views import views

F = nn.functional


def kinds(found: Program) -> list[str]:
    return [norm.kind for norm in views(Norm, found)]


@pytest.mark.parametrize(
    ("name", "missed"),
    [("gpt2", 0), ("bare-norms", 0), ("tied-head", 0), ("tied-blocks", 0), ("vit", 1)],
)
def test_after_folding_every_norm_of_the_stream_is_an_rms_norm(name: str, missed: int) -> None:
    folded = FoldNorms(untie=True)(canonical(name)).program
    result = checked(folded, CenterResidual(untie=True))
    assert kinds(result.program).count("layer") == missed
    assert [remark.kind for remark in result.remarks].count("missed") == missed


@pytest.mark.parametrize("name", MODELS)
def test_it_is_exact_wherever_it_applies(name: str) -> None:
    result = checked(canonical(name), CenterResidual(untie=True))
    assert result.remarks


def test_rows_of_tables_and_outputs_of_linears_have_no_mean() -> None:
    after = CenterResidual()(canonical("bare-norms")).program
    state = {k: v.detach().double() for k, v in module("bare-norms").state_dict().items()}
    for name, axis in (("embed.weight", 1), ("down.weight", 0), ("down.bias", 0)):
        expected = state[name] - state[name].mean(axis, keepdim=True)
        assert torch.equal(after.weights[f"{name}.centered_out"].load(), expected.float())


def test_gains_and_epsilons_stay() -> None:
    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm = nn.Linear(8, 8), nn.LayerNorm(8, eps=0.1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.norm(self.up(x)).relu()
            return result

    after = checked(small(Gained), CenterResidual()).program
    (norm,) = (norm for node in after.graph.nodes if (norm := Norm.match(node)))
    assert norm.gain is not None
    assert (norm.kind, norm.gain.target, norm.eps) == ("rms", "norm.weight", 0.1)


def reasons(found: Program, **options: bool) -> list[str]:
    result = CenterResidual(**options)(found)
    assert not result.modified
    return [remark.message for remark in result.remarks]


def test_a_norm_with_a_bias_stays() -> None:
    (reason,) = reasons(canonical("norm-mlp"))
    assert "%x (input x) writes it" in reason
    (reason,) = reasons(canonical("tied-head"))
    assert reason == "1 LayerNorm stays: the norm keeps a bias: run fold-norms first"


def test_models_with_rms_norms_are_left_alone() -> None:
    (reason,) = reasons(canonical("llama"))
    assert reason == "all 5 norms are RMSNorms, which see the mean"
    assert reasons(canonical("rep-tokens")) == ["has no norm"]


def test_a_post_norm_model_is_left_alone() -> None:
    found = reasons(canonical("bert"), untie=True)
    assert sum("whose gain or bias gives it a mean" in reason for reason in found) == 4


def test_a_tied_head_is_refused_or_untied() -> None:
    (reason,) = reasons(canonical("tied-blocks"))
    assert reason == "3 LayerNorms of this stream stay: head is tied; untie=true to force"
    result = checked(canonical("tied-blocks"), CenterResidual(untie=True))
    assert "untied embed from %linear_4: 1536 bytes" in [r.message for r in result.remarks]
    assert "embed.weight" in result.program.weights


class BareTied(nn.Module):
    """A tied head behind a norm without gain: centred rows of its weight give the same logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(torch.relu(self.up(F.layer_norm(x, [8]))))
        return F.linear(F.layer_norm(x, [8])[:, 1:], self.embed.weight)


def test_a_tied_head_that_sees_no_mean_stays_tied() -> None:
    before = small(BareTied, torch.zeros(2, 3, dtype=torch.int64))
    result = checked(before, CenterResidual())
    assert kinds(result.program) == ["rms", "rms"]
    assert not any("untied" in remark.message for remark in result.remarks)
    read = {str(n.target) for n in result.program.graph.find_nodes(op="get_attr")}
    assert {name for name in read if "embed" in name} == {"embed.weight.centered_out"}


class TwoStreams(nn.Module):
    """Two streams share a linear; something else writes the second one, too."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        first = F.layer_norm(self.shared(x) + self.own(x), [8])
        second = F.layer_norm(self.shared(x + 1) + x, [8])
        return first.relu() + second.relu()


def test_one_refusal_costs_the_streams_that_share_its_writers() -> None:
    found = reasons(small(TwoStreams))
    assert len(found) == 2
    assert "also read by %linear_2 (aten.linear); untie=true to force" in found[0]
    assert "%x (input x) writes it" in found[1]
    result = checked(small(TwoStreams), CenterResidual(untie=True))
    assert kinds(result.program) == ["rms", "layer"]


def test_quantised_writers_keep_their_grid() -> None:
    quantized = QuantizeWeights(group_size=4)(canonical("bare-norms")).program
    (reason,) = reasons(quantized, untie=True)
    assert reason.endswith("writes it, which is quantised already")


def test_two_graphs_over_one_table_of_weights_share_what_is_centred() -> None:
    one, other = canonical("bare-norms").editable(), canonical("bare-norms").editable()
    signatures = {"encoder": one.signature, "decoder": other.signature}
    both = replace(
        one, graphs={"encoder": one.graph, "decoder": other.graph}, signatures=signatures
    )
    result = checked(both, CenterResidual())
    assert kinds(result.program) == ["rms"] * 4
    assert len(result.program.weights) == len(both.weights)
