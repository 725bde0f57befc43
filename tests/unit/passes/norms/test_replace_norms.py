"""Norms become RepBN with measured statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import Norm, PassError, Program, call_name, capture
from modelathe.passes import FoldRepBatchNorms, Pipeline, ReplaceNorms
from modelathe.passes.analysis.channel_moments import ChannelMoments
from modelathe.passes.norms.channels import unpermuted
from modelathe.passes.norms.rep_batch_norm import (
    EPS,
    RepBatchNorm,
    RepParameters,
    insert_rep_batch_norm,
)
from support.models import canonical, context, perturb
from support.numeric import EXACT, relative_error
from support.views import views


def moments(x: Tensor, y: Tensor) -> ChannelMoments:
    return ChannelMoments.of(x, y)


def inserted(x: Tensor, statistics: ChannelMoments) -> tuple[Program, Tensor]:
    """Return a norm of ``x`` replaced by the RepBN of some statistics, and its output."""
    program = capture(nn.LayerNorm(x.shape[-1]).eval(), (x,)).editable()
    (norm,) = views(Norm, program)
    norm.node.replace_all_uses_with(
        insert_rep_batch_norm(program, norm.node, RepParameters.fitted(statistics))
    )
    program.clean()
    (name,) = program.signature.inputs
    return program, program.run({name: x}, dtype=torch.float64)["output"]


@pytest.mark.parametrize("shape", [(9, 4), (3, 5, 4), (2, 3, 5, 4)])
def test_the_map_of_each_channel_is_the_line_of_least_squares(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) * torch.tensor([1.0, 5, 0.1, 30]) + 3
    y = torch.tanh(x) + torch.randn(shape, generator=generator)
    program, found = inserted(x, moments(x, y))
    for channel in range(4):
        column, wanted = (value[..., channel].flatten().double() for value in (x, y))
        design = torch.stack([column, torch.ones_like(column)], 1)
        line = torch.linalg.lstsq(design, wanted[:, None], driver="gelsd").solution
        # the parameters are stored in float32: eight roundings, of a slope times 30 at most
        fitted = (design @ line).flatten()
        assert relative_error(fitted, found[..., channel].flatten()) <= 1e-5
    (rep,) = views(RepBatchNorm, program)
    assert program.weight(rep.norm.mean).dtype == torch.float32


def test_gain_bias_and_alpha_follow_from_the_slopes() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    slopes, offsets = torch.tensor([1.0, 2, 3, 6]), torch.tensor([0.5, 0, -1, 2])
    program, found = inserted(x, moments(x, x * slopes + offsets))
    torch.testing.assert_close(found, (x * slopes + offsets).double(), atol=1e-5, rtol=1e-5)
    (rep,) = views(RepBatchNorm, program)
    values = [program.weight(part).load() for part in (rep.alpha, rep.norm.gain, rep.norm.mean)]
    torch.testing.assert_close(values[0], torch.tensor([3.0]))
    deviation = (x.var(0, correction=0) + EPS).sqrt()
    torch.testing.assert_close(values[1], (slopes - 3) * deviation)
    torch.testing.assert_close(values[2], x.mean(0))


def test_statistics_are_buffers_and_the_rest_is_trained() -> None:
    x = torch.randn(20, 3)
    program, _ = inserted(x, moments(x, x))
    trained = {name for name in program.weights if program.weights.is_parameter(name)}
    assert len(trained) == 3
    assert len(set(program.weights) - trained) == 2
    assert all(".running_" in name for name in set(program.weights) - trained)


def test_a_channel_that_does_not_vary_gives_its_mean() -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(3))
    x[:, 1] = 7
    y = x * 2 + 1
    _, found = inserted(x, moments(x, y))
    assert found.isfinite().all()
    torch.testing.assert_close(found, y.double(), atol=1e-4, rtol=1e-5)


def test_statistics_that_float16_has_no_numbers_for_are_refused() -> None:
    x = torch.randn(8, 4).half()
    program = capture(nn.LayerNorm(4).half().eval(), (x,)).editable()
    wide = torch.randn(8, 4) * 1000
    parameters = RepParameters.fitted(moments(wide, wide))
    with pytest.raises(PassError, match="varies more than"):
        insert_rep_batch_norm(program, views(Norm, program)[0].node, parameters)


@pytest.mark.parametrize("name", ["token-norm", "bert", "llama", "gemma3", "t5"])
def test_every_norm_is_replaced_wherever_it_stands(name: str) -> None:
    before = canonical(name)
    result = ReplaceNorms()(before, context())
    assert [remark.kind for remark in result.remarks] == ["applied"] * len(views(Norm, before))
    assert not views(Norm, result.program)
    assert len(views(RepBatchNorm, result.program)) == len(views(Norm, before))


def inputs_of(found: Program, names: set[str], tokens: Tensor) -> dict[str, Tensor]:
    """Return the values of named nodes of an encoder."""
    values: dict[str, Tensor] = {}
    feeds = {name: torch.ones_like(tokens) for name in found.signature.inputs}
    feeds = {**feeds, "input_ids": tokens}
    if "token_type_ids" in feeds:
        feeds["token_type_ids"] = torch.zeros_like(tokens)
    found.run(feeds, observe=lambda node, value: values.update({node.name: value}))
    return {name: values[name] for name in names}


def test_each_norm_is_measured_with_those_before_it_replaced() -> None:
    before, options = canonical("bert"), context()
    tokens = options.calibration_tokens(before).tokens
    after = ReplaceNorms()(before, options).program
    made = views(RepBatchNorm, after)
    roots = {unpermuted(rep.input)[0].name for rep in made}
    reads = inputs_of(after, roots, tokens)
    gives = inputs_of(before, {norm.node.name for norm in views(Norm, before)}, tokens)
    for rep, norm in zip(made, views(Norm, before), strict=True):
        x, y = reads[unpermuted(rep.input)[0].name], gives[norm.node.name]
        wanted = RepParameters.fitted(ChannelMoments.of(x, y))
        for part, node in (
            (wanted.mean, rep.norm.mean),
            (wanted.variance, rep.norm.variance),
            (wanted.bias, rep.norm.bias),
        ):
            assert node is not None
            assert relative_error(part, after.weight(node).load()) <= 1e-4  # a few float32 layers


def test_no_more_tokens_are_read_than_asked_for() -> None:
    result = ReplaceNorms(tokens=30)(canonical("token-norm"), context())
    assert "from 24 vectors" in str(result.remarks)  # two windows of 12
    result = ReplaceNorms(tokens=1)(canonical("token-norm"), context())
    assert "from 12 vectors" in str(result.remarks)
    with pytest.raises(ValueError, match="tokens is at least 1"):
        ReplaceNorms(tokens=0)


def test_what_is_made_can_be_folded_exactly() -> None:
    made = ReplaceNorms()(canonical("token-norm"), context()).program
    folded = FoldRepBatchNorms()(made).program
    assert [call_name(n) for n in folded.graph.nodes if n.op == "call_function"] == [
        "aten.embedding",
        "aten.linear",
    ]
    ids = {"input_ids": torch.arange(12).reshape(3, 4)}
    wide = [each.run(ids, dtype=torch.float64)["output"] for each in (made, folded)]
    assert relative_error(*wide) <= EXACT


def test_globs_choose_the_norms() -> None:
    before = canonical("llama")
    some = ReplaceNorms(only=("layers.1",), ignore=("post_attention_layernorm",))
    after = some(before, context()).program
    assert len(views(Norm, before)) - len(views(Norm, after)) == 1
    with pytest.raises(PassError, match="matches none of the 5 modules"):
        ReplaceNorms(only=("layers.7",))(before, context())


class Odd(nn.Module):
    """A norm over two dimensions and one of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm = nn.LayerNorm((3, 4)), nn.LayerNorm(4)
        self.embed, self.basis = nn.Embedding(48, 4), nn.Parameter(torch.zeros(5, 4))

    def forward(self, input_ids: Tensor) -> Tensor:
        return nn.functional.linear(self.wide(self.embed(input_ids)), self.norm(self.basis))


def test_odd_norms_are_refused_with_the_reason() -> None:
    model = Odd().eval()
    perturb(model)
    before = capture(model, (torch.zeros(2, 3, dtype=torch.int64),))
    first, second = ReplaceNorms()(before, context()).remarks
    assert str(first) == (
        "missed: layer_norm: normalises over 2 dimensions, and a RepBN has one of channels"
    )
    assert str(second) == (
        "missed: layer_norm_1: normalises a weight, which is the same for every token"
    )


def test_a_model_without_tokens_is_refused() -> None:
    with pytest.raises(PassError, match="reads no tokens"):
        ReplaceNorms()(canonical("vit"), context())


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="kind is rep-batch-norm"):
        ReplaceNorms(kind="batch-norm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only is a tuple"):
        ReplaceNorms(only="layers")  # type: ignore[arg-type]


def test_a_pipeline_measures_how_much_is_lost() -> None:
    pipeline = Pipeline.parse("replace-norms,fold-rep-batch-norms", context=context())
    steps = pipeline(canonical("llama")).steps
    assert steps[-2].measured.kl is not None
    assert steps[-2].measured.kl > 0.01
    assert steps[-1].measured.error is not None
    assert steps[-1].measured.error <= EXACT
