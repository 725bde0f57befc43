"""Readers of LayerNorms and heads lose what changes nothing, or keep it with a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import FidelityError, Linear, Program, insert_call
from modelathe.passes import CenterResidual, FoldNorms, PassResult, QuantizeWeights
from modelathe.passes.fidelity import judge_rounding
from support.exactness import checked
from support.models import MODELS, canonical, module
from support.small import Build, small
from support.views import views

F = nn.functional
READERS = FoldNorms(gains=False, center_readers=True)
LOGITS = FoldNorms(gains=False, center_logits=True)


def with_logits(build: Build) -> Program:
    """Return a small module whose output is what a head makes."""
    found = small(build)
    return replace(found, signatures={"main": found.signature.renamed({"output": "logits"})})


def texts(result: PassResult) -> list[str]:
    return [str(remark) for remark in result.remarks]


@pytest.mark.parametrize("name", MODELS)
def test_all_options_are_exact_wherever_they_apply(name: str) -> None:
    everything = FoldNorms(center_readers=True, value_bias=True, center_logits=True, untie=True)
    said = texts(checked(canonical(name), everything))
    for option in ("center-readers", "value-bias", "center-logits"):
        words = {"center-readers": "rows of", "value-bias": "value bias of"}
        word = words.get(option, "mean over the vocabulary")
        assert any(f"{option}: " in text or word in text for text in said), option


def test_rows_of_readers_have_no_mean() -> None:
    after = checked(canonical("bare-norms"), READERS).program
    for name in ("up", "head"):
        weight = module("bare-norms").state_dict()[f"{name}.weight"].double()
        found = after.weights[f"{name}.weight.centered_in"].load()
        assert torch.equal(found, (weight - weight.mean(1, keepdim=True)).float())


def test_a_gain_is_folded_first() -> None:
    result = checked(canonical("gpt2"), FoldNorms(center_readers=True))
    assert sum("rows of" in text for text in texts(result)) == 4
    (missed,) = (text for text in texts(result) if "which is still there" in text)
    assert missed.startswith("missed: layer_norm_4: center-readers: its gain or bias")
    result = checked(canonical("gpt2"), READERS)
    assert not result.modified


class Biased(nn.Module):
    """A linear behind a LayerNorm with a bias and no gain."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.up = nn.Parameter(torch.zeros(8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.up(F.layer_norm(x, [8], None, self.bias))
        return result


def test_a_bias_alone_gives_a_norm_a_mean() -> None:
    (missed,) = texts(READERS(small(Biased)))
    assert missed.startswith("missed: layer_norm: center-readers: its gain or bias")
    folded = checked(small(Biased), FoldNorms(center_readers=True))
    assert texts(folded)[0] == "applied: layer_norm: bias folded into %linear"


def test_rms_norms_have_a_mean() -> None:
    result = READERS(FoldNorms()(canonical("llama")).program)
    (missed,) = texts(result)
    assert missed == (
        "missed: rms_norm_default: center-readers: 5 RMSNorms that linears read have a mean"
    )


class Shared(nn.Module):
    """Two linears with one weight; only one reads a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.own = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, [8])
        result: Tensor = self.up(y) + self.own(y) + self.up(x)
        return result


def test_a_shared_reader_is_refused_or_untied_and_the_others_are_not() -> None:
    result = checked(small(Shared), READERS)
    shared = "the weight of %linear is also read by %linear_2 (aten.linear); untie=true to force"
    assert texts(result) == [
        "applied: layer_norm: rows of %linear_1 centred",
        f"missed: linear: center-readers: {shared}",
    ]
    forced = texts(checked(small(Shared), replace(READERS, untie=True)))
    assert "applied: linear: untied up from %linear_2: 256 bytes" in forced


def test_readers_beside_others_are_centred_too() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = F.layer_norm(x, [8])
            result: Tensor = self.up(y) + y
            return result

    assert checked(small(Beside), READERS).modified


def test_quantised_readers_keep_their_grid() -> None:
    quantized = QuantizeWeights(group_size=4)(canonical("bare-norms")).program
    found = texts(READERS(quantized))
    assert found == [
        f"missed: {norm}: center-readers: %{linear} is quantised already"
        for norm, linear in (
            ("layer_norm", "quantized_linear_default"),
            ("layer_norm_1", "quantized_linear_default_2"),
        )
    ]


def test_columns_of_the_head_have_no_mean() -> None:
    after = checked(canonical("bare-norms"), LOGITS).program
    state = module("bare-norms").state_dict()
    for name in ("head.weight", "head.bias"):
        wide = state[name].double()
        found = after.weights[f"{name}.centered_logits"].load()
        assert torch.equal(found, (wide - wide.mean(0, keepdim=True)).float())


def test_raw_logits_move_and_log_probabilities_do_not() -> None:
    before = canonical("bare-norms")
    after = LOGITS(before).program
    with pytest.raises(FidelityError, match="output logits is off by"):
        judge_rounding(before, after, "here")


def test_a_tied_head_is_refused_or_untied() -> None:
    assert texts(LOGITS(canonical("llama"))) == [
        "missed: linear_14: center-logits: head is tied; untie=true to force"
    ]
    result = checked(canonical("llama"), replace(LOGITS, untie=True))
    assert texts(result)[0] == "applied: linear_14: mean over the vocabulary removed"
    assert texts(result)[1].startswith("applied: linear_14: untied lm_head from %embedding: ")


class Head(nn.Module):
    """A head, and what ``form`` makes of its logits."""

    def __init__(self, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.form, self.head = form, nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self.head(x))


@pytest.mark.parametrize(
    "form", [lambda y: y * 0.0625, lambda y: y / 2.0, lambda y: y[:, -1:] * 3.0]
)
def test_factors_and_moves_keep_a_shift_a_shift(form: Callable[[Tensor], Tensor]) -> None:
    assert checked(with_logits(lambda: Head(form)), LOGITS).modified


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (lambda y: 30.0 * torch.tanh(y / 30.0), "logits come from %tanh (aten.tanh), which"),
        (lambda y: y * torch.arange(16), "logits come from %mul (aten.mul.Tensor), which"),
        (lambda y: y[..., :8], "logits come from %slice_1 (aten.slice.Tensor), which"),
        (lambda y: y.transpose(1, 2), "logits come from %transpose (aten.transpose.int), which"),
        (lambda y: y + y.relu() * 0, "logits come from %add (aten.add.Tensor), which"),
        (lambda y: y + y[..., :1], "logits come from %add (aten.add.Tensor), which"),
    ],
)
def test_anything_else_behind_the_head_does_not(
    form: Callable[[Tensor], Tensor], reason: str
) -> None:
    result = LOGITS(with_logits(lambda: Head(form)))
    assert not result.modified
    assert reason in texts(result)[0]


def test_a_head_that_something_else_reads_is_refused() -> None:
    found = with_logits(lambda: Head(lambda y: y))
    (head,) = views(Linear, found)
    (values,) = found.graph.output_node().args
    assert isinstance(values, tuple)
    found.graph.output_node().args = ((*values, head.input),)
    extra = replace(found.signature, outputs=("logits", "hidden"))
    assert checked(replace(found, signatures={"main": extra}), LOGITS).modified
    found.graph.output_node().args = ((head.node, head.node),)
    twice = replace(found.signature, outputs=("logits", "hidden"))
    result = LOGITS(replace(found, signatures={"main": twice}))
    assert "%linear (aten.linear) is another output, too" in texts(result)[0]


def test_a_head_that_another_call_reads_is_refused() -> None:
    found = with_logits(lambda: Head(lambda y: y))
    (head,) = views(Linear, found)
    end = found.graph.output_node()
    squashed = insert_call(
        found.graph, torch.ops.aten.relu.default, (head.node,), before=end, like=end
    )
    end.args = ((head.node, squashed),)
    more = replace(found.signature, outputs=("logits", "squashed"))
    result = LOGITS(replace(found, signatures={"main": more}))
    assert "%linear (aten.linear) is read by more than one" in texts(result)[0]


def test_models_without_logits_are_left_alone() -> None:
    assert texts(LOGITS(canonical("bert"))) == [
        "missed: main: center-logits: no output is called logits"
    ]


def test_an_option_that_does_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one of gains, center-readers, value-bias and"):
        FoldNorms(gains=False)


def test_a_centred_weight_that_was_trained_is_centred_again() -> None:
    before = READERS(canonical("bare-norms")).program.editable()
    weight = views(Linear, before)[0].weight
    trained = before.weights[str(weight.target)].load() + 1
    weight.target = before.add_weight(f"{weight.target}.healed", trained)
    assert texts(checked(before, READERS)) == ["applied: layer_norm: rows of %linear centred"]


class Tied(nn.Module):
    """An embedding, a norm, and a head with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        found = F.layer_norm(self.embed(x.argmax(-1)), [8])
        return F.linear(found, self.embed.weight)


def test_a_head_whose_table_was_centred_for_the_stream_is_centred_too() -> None:
    before = CenterResidual()(with_logits(Tied)).program
    pass_ = FoldNorms(gains=False, center_logits=True, untie=True)
    assert "applied: linear: mean over the vocabulary removed" in texts(checked(before, pass_))
