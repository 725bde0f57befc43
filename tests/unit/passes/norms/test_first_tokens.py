"""First tokens and ends of text with a constant of their own, where a norm is frozen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from modelathe.ir import Norm, Program, TensorWeight, call_name
from modelathe.passes import PassResult, RemoveNorms
from modelathe.passes.analysis.norm_deviations import Deviation, norm_deviations
from modelathe.passes.consistency import judge_consistency
from modelathe.passes.norms import remove_norms
from modelathe.passes.norms.freezing import Constant
from modelathe.passes.norms.norm_switch import NormSwitch
from modelathe.passes.norms.remove_norms import frozen
from modelathe.passes.probes import empty_cache, feeds
from support.models import canonical
from support.numeric import worst_error
from support.training import context


def removed(program: Program, **options: Any) -> PassResult:
    return RemoveNorms(untie=True, **options)(program, context())


def unlike_first_tokens() -> Program:
    """Return a model whose first position is larger than the others."""
    program = canonical("gpt2").editable()
    table = program.weights["transformer.wpe.weight"].load().clone()
    table[0] *= 20
    program.weights.put("transformer.wpe.weight", TensorWeight(table))
    return program


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prefilling_and_decoding_agree_when_first_tokens_are_special(name: str) -> None:
    program = canonical(name)
    plan = {
        key: Constant(found.usual, 3 * found.usual)
        for key, found in norm_deviations(program, context()).norms.items()
    }
    judge_consistency(program, frozen(program.editable(), plan, untie=True).program, "frozen")


def test_first_tokens_have_a_constant_of_their_own_where_they_are_unlike_others() -> None:
    program = canonical("gpt2")
    measured = norm_deviations(program, context()).norms
    special = {k for k, d in measured.items() if d.first and abs(d.first - d.usual) > 2 * d.spread}
    assert set() < special < set(measured)
    told = [r.where for r in removed(program).remarks if "first tokens by" in r.message]
    assert set(told) == special


def test_that_first_tokens_are_like_others_is_said() -> None:
    program = canonical("bert")
    told = [remark for remark in removed(program).remarks if remark.where == "first tokens"]
    assert ["2 standard deviations" in remark.message for remark in told] == [True]
    without = removed(program, first_position=False).remarks
    assert not [remark for remark in without if remark.where == "first tokens"]


def test_one_call_makes_the_factors_of_all_norms() -> None:
    program = unlike_first_tokens()
    plan = {
        key: Constant(found.usual, number * found.usual)
        for number, (key, found) in enumerate(norm_deviations(program, context()).norms.items(), 2)
    }
    after = frozen(program.editable(), plan, untie=True).program
    names = [call_name(node) for node in after.graph.nodes if node.op == "call_function"]
    assert (names.count("aten.where.ScalarOther"), names.count("aten.mul.Tensor")) == (1, len(plan))


def test_factors_of_first_tokens_are_not_trained() -> None:
    program = unlike_first_tokens()
    after = removed(program).program
    (name,) = [name for name in after.weights if name.startswith("first_tokens")]
    assert not after.weights.is_parameter(name)


@pytest.mark.parametrize("end", [2, [9, 2]])
def test_end_of_text_is_special_on_the_way_to_values_alone(end: Any) -> None:
    program = unlike_first_tokens()
    program = replace(program, config={**program.config, "eos_token_id": end})
    result = removed(program, end_of_text=True)
    assert not any(map(Norm.match, result.program.graph.nodes))
    judge_consistency(program, result.program, "remove-norms")
    separate = removed(program)
    tokens = torch.full((1, 6), 5)
    tokens[0, 3] = 2
    outs = [
        one.run(feeds(one, tokens, empty_cache(one, 1), 0))["logits"]
        for one in (result.program, separate.program)
    ]
    assert not torch.equal(outs[0][:, 3:], outs[1][:, 3:])
    assert worst_error({"y": outs[0][:, :3]}, {"y": outs[1][:, :3]}) < 1e-5


def test_a_norm_in_training_knows_every_end_of_text() -> None:
    norm = next(norm for node in canonical("gpt2").graph.nodes if (norm := Norm.match(node)))
    switch = NormSwitch(norm, "value", Deviation(4.0, 8.0), ends=True, end=(9, 2))
    switch.tokens = torch.tensor([[5, 9, 3, 2]])
    x = torch.tensor([1.0, -1.0]) * torch.tensor([[[1.0], [20.0], [3.0], [40.0]]])
    switch(x, [2])  # live: the running mean takes in the third token alone
    assert float(switch.usual) == pytest.approx(0.9 * 4 + 0.1 * 3, rel=1e-4)
    switch.frozen.fill_(True)
    divisors = (x / switch(x, [2]))[0, :, 0]
    assert divisors.isclose(switch.special.float()).tolist() == [True, True, False, True]


def test_first_tokens_are_not_special_where_a_cache_hides_which_they_are() -> None:
    result = removed(canonical("t5"))
    (why,) = [r for r in result.remarks if "reads no positions" in r.message]
    assert why.where == "decoder"
    judge_consistency(canonical("t5"), result.program, "remove-norms")


def test_end_of_text_tokens_without_a_path_to_values_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def said() -> bool:
        result = RemoveNorms(untie=True, end_of_text=True)(canonical("gpt2"), context())
        return any(r.kind == "missed" and r.where == "end-of-text tokens" for r in result.remarks)

    assert not said()
    monkeypatch.setattr(remove_norms, "split_fused", lambda program, graph: [])
    assert said()
