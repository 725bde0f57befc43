"""Norms that are frozen: exact where their constants are true, folded away, and turned in order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from modelathe.ir import (
    Linear,
    Norm,
    PassError,
    Program,
    TensorWeight,
    call_name,
    fingerprint,
    marks_of,
)
from modelathe.passes import Fidelity, Heal, PassResult, Pipeline, QuantizeWeights, RemoveNorms
from modelathe.passes.analysis.norm_deviations import deviation, norm_deviations
from modelathe.passes.norms.freezing import Constant
from modelathe.passes.norms.norm_switch import NormSwitch
from modelathe.passes.norms.remove_norms import frozen
from modelathe.passes.probes import empty_cache, feeds
from support.models import canonical
from support.numeric import worst_error
from support.training import SHORT, context, text
from support.views import views

UNTIED: dict[str, Any] = {"untie": True}


def removed(name: str, **options: Any) -> PassResult:
    return RemoveNorms(**options)(canonical(name), context())


def inputs(program: Program) -> dict[str, torch.Tensor]:
    from modelathe.passes.probes import empty_cache

    tokens = text(3).tokens
    return feeds(program, tokens, empty_cache(program, len(tokens)), 0)


def with_constants(program: Program, plan: dict[str, Constant]) -> Program:
    """Return the program with its norms computed by constants, nothing folded."""
    made = program.editable()
    for node in made.graph.nodes:
        norm = Norm.match(node)
        if norm is not None and node.name in plan:
            node.target = Frozen(norm, plan[node.name])
    return made


class Frozen:
    """A norm that divides by a constant."""

    def __init__(self, norm: Norm, constant: Constant) -> None:
        self.norm, self.constant = norm, constant

    def __call__(self, x: torch.Tensor, sizes: Any, *rest: Any) -> torch.Tensor:
        gain = rest[0] if rest else None
        bias = rest[1] if self.norm.kind == "layer" and len(rest) > 1 else None
        divisor = torch.full(x.shape[:-1], self.constant.usual, dtype=x.dtype)
        if self.constant.first is not None:
            divisor[:, 0] = self.constant.first
        y = x - x.mean(-1, keepdim=True) if self.norm.kind == "layer" else x
        y = y / divisor[..., None]
        y = y if gain is None else y * gain
        return y if bias is None else y + bias


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "llama-bf16"])
@pytest.mark.parametrize(("first", "untie"), [(True, True), (False, True), (True, False)])
def test_what_is_folded_computes_what_frozen_norms_do(name: str, first: bool, untie: bool) -> None:
    before = canonical(name)
    measured = norm_deviations(before, context()).norms
    plan = {
        node: Constant(found.usual, found.first if first else None)
        for node, found in measured.items()
    }
    after = frozen(before.editable(), plan, untie=untie).program
    assert not views(Norm, after)
    expected = with_constants(before, plan).run(inputs(before), dtype=torch.float64)
    assert worst_error(after.run(inputs(before), dtype=torch.float64), expected) < 1e-10


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_norm_frozen_at_the_true_deviation_is_the_norm(name: str) -> None:
    program = canonical(name)
    norm = views(Norm, program)[0]
    x = torch.randn(1, 1, 32, dtype=torch.float64) + 3  # one token, a mean that is not zero
    gain = torch.randn(32, dtype=torch.float64)
    true = float(deviation(x, norm.kind, norm.eps))
    live: Any = norm.node.target
    rest = (gain, gain, norm.eps) if norm.kind == "layer" else (gain, norm.eps)
    found = Frozen(norm, Constant(true))(x, [32], *rest)
    assert worst_error({"y": found}, {"y": live(x, [32], *rest)}) < 1e-12


@pytest.mark.parametrize(("name", "ends"), [("gpt2", 2), ("llama", [5, 2])])
def test_deviations_are_the_means_over_tokens(name: str, ends: Any) -> None:
    given = text().tokens
    program = canonical(name)
    program = replace(program, config={**program.config, "eos_token_id": ends})
    seen: dict[str, torch.Tensor] = {}
    places = {norm.input: norm for norm in views(Norm, program)}

    def observe(node: Any, value: torch.Tensor) -> None:
        if node in places:
            norm = places[node]
            seen[norm.node.name] = deviation(value.double(), norm.kind, norm.eps)

    program.run(feeds(program, given, empty_cache(program, len(given)), 0), observe=observe)
    found = norm_deviations(program, context()).norms
    end = ~torch.isin(given, torch.tensor(ends))
    end[:, 0] = False
    for node, value in seen.items():
        assert found[node].usual == pytest.approx(float(value[end].mean()), rel=1e-5)
        assert found[node].first == pytest.approx(float(value[:, 0].mean()), rel=1e-5)


def test_both_graphs_of_an_encoder_decoder_are_measured_apart() -> None:
    program = canonical("t5")
    found = norm_deviations(program, context()).norms
    assert len(found) == len(views(Norm, program))
    result = removed("t5", untie=True)
    assert not views(Norm, result.program)


def test_a_tied_head_keeps_its_weight_and_the_norm_leaves_an_affine_map() -> None:
    result = removed("gpt2")
    assert not views(Norm, result.program)
    assert len(result.program.weights.aliases) == len(canonical("gpt2").weights.aliases)
    (left,) = [r for r in result.remarks if r.kind == "missed"]
    assert "one product and one sum" in left.message


def test_untying_leaves_nothing_and_says_what_it_costs() -> None:
    result = removed("gpt2", **UNTIED)
    assert not views(Norm, result.program)
    assert any("untied" in remark.message for remark in result.remarks)
    assert not [remark for remark in result.remarks if remark.kind == "missed"]


def test_norms_that_make_the_stream_are_refused_and_the_one_of_the_embeddings_is_not() -> None:
    result = removed("bert")
    assert len(views(Norm, result.program)) == len(views(Norm, canonical("bert"))) - 1
    refused = [r.message for r in result.remarks if r.kind == "missed" and "mean" in r.message]
    assert len(refused) == 4


def test_a_target_keeps_the_norms_that_would_pass_it() -> None:
    all_of_them = Pipeline([RemoveNorms(**UNTIED)], context=context())(canonical("gpt2"))
    kl = all_of_them.measured.kl
    assert kl is not None
    part = removed("gpt2", target_kl=kl * 0.7, **UNTIED)
    assert 0 < len(views(Norm, part.program)) < len(views(Norm, canonical("gpt2")))
    assert any("passes target-kl" in remark.message for remark in part.remarks)


def test_values_that_overflow_without_norms_are_an_error() -> None:
    program = canonical("llama").editable()  # its MLP multiplies two values
    name = "model.embed_tokens.weight"
    table = program.weights[name].load().clone()
    table[text().tokens[0, 0]] *= 1e12  # which is read at the first position only
    program.weights.put(name, TensorWeight(table))
    options = {"first_position": False, **UNTIED}
    with pytest.raises(PassError, match=r"overflow, first at %\w+ \(aten\.\w+.*layers") as caught:
        RemoveNorms(**options)(program, context())
    assert "schedule=progressive" in caught.value.remedy
    some = RemoveNorms(target_kl=1.0, **options)(program, context()).program
    assert 0 < len(views(Norm, some)) <= len(views(Norm, program))


def test_marks_change_no_output_and_are_part_of_the_program() -> None:
    pass_ = RemoveNorms(schedule="progressive", untie=True)
    before, after = canonical("gpt2"), pass_(canonical("gpt2"), context()).program
    assert fingerprint(before) != fingerprint(after)
    given = inputs(before)
    wide = [one.run(given, dtype=torch.float64) for one in (after, before)]
    assert worst_error(*wide) < 1e-12
    marked = [norm.node for norm in views(Norm, after) if "switch" in marks_of(norm.node)]
    paths = [marks_of(node)["path"] for node in marked]
    assert sorted(set(paths)) == ["final", "mlp", "query-key", "value"]
    assert pass_.fidelity is Fidelity.LOSSY


def test_healing_freezes_what_is_marked_and_folds_it() -> None:
    marked = removed("gpt2", schedule="progressive", **UNTIED).program
    result = Heal(**SHORT)(marked, context())
    assert not views(Norm, result.program)
    calls = [call_name(node) for node in result.program.graph.nodes]
    assert "aten.eq.Scalar" not in calls  # first tokens are not special any more
    # nor are queries, keys and values apart
    assert calls.count("aten.linear") == len(views(Linear, canonical("gpt2")))
    assert len(result.program.graph.nodes) < len(canonical("gpt2").graph.nodes)


def test_paths_that_were_separated_for_nothing_are_one_again() -> None:
    result = removed("gpt2", target_kl=1e-12, end_of_text=True, **UNTIED)
    assert not result.modified
    assert fingerprint(result.program) == fingerprint(canonical("gpt2"))


def test_a_learning_curve_says_how_many_norms_are_live() -> None:
    marked = removed("gpt2", schedule="progressive", **UNTIED).program
    live = [point["live"] for point in Heal(**SHORT)(marked, context()).details["curve"]]
    assert live[0] == len(views(Norm, marked))
    assert live == sorted(live, reverse=True)
    assert live[-1] == 0


def test_a_short_target_leaves_norms_live_and_says_so() -> None:
    marked = removed("gpt2", schedule="progressive", target_kl=1e-9, **UNTIED).program
    result = Heal(**SHORT)(marked, context())
    left = views(Norm, result.program)
    assert left
    assert all(not marks_of(norm.node) for norm in left)
    assert any("still live" in remark.message for remark in result.remarks)


def test_switches_turn_in_the_order_of_the_paths() -> None:
    pass_ = RemoveNorms(schedule="progressive", untie=True)
    program = pass_(canonical("gpt2"), context()).program
    marked = [norm.node for norm in views(Norm, program) if "switch" in marks_of(norm.node)]
    switches = pass_.make_switches(program, marked, context())
    order: list[str] = []
    for step in range(100):
        pass_.turn(switches, step, 100, 0.0)
        for node, switch in switches.items():
            assert isinstance(switch, NormSwitch)
            if switch.frozen and node.name not in order:
                order.append(node.name)
        if step < 5:
            assert not order
    paths = [marks_of(node)["path"] for name in order for node in marked if node.name == name]
    assert paths == ["mlp"] * 2 + ["query-key"] * 2 + ["value"] * 2 + ["final"]
    assert all(switch.turned == 1.0 for switch in switches.values())


def test_a_live_switch_follows_the_deviation_and_a_frozen_one_does_not() -> None:
    pass_ = RemoveNorms(schedule="progressive", untie=True)
    program = pass_(canonical("gpt2"), context()).program
    node = next(norm.node for norm in views(Norm, program) if "switch" in marks_of(norm.node))
    switch = pass_.make_switches(program, [node], context())[node]
    assert isinstance(switch, NormSwitch)
    before = float(switch.usual)
    switch.tokens = text(2).tokens
    x = 100 * torch.randn(2, 8, 32)
    switch(x, [32], None, None, 1e-5)
    assert float(switch.usual) > 2 * before
    switch.frozen.fill_(True)
    kept = float(switch.usual)
    switch(10 * x, [32], None, None, 1e-5)
    assert float(switch.usual) == kept


@pytest.mark.parametrize("name", ["vit", "norm-mlp"])
def test_what_reads_no_text_is_refused(name: str) -> None:
    with pytest.raises(PassError, match="reads no text"):
        removed(name)


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="target_kl"):
        RemoveNorms(target_kl=0.0)
    with pytest.raises(ValueError, match="first"):
        RemoveNorms(end_of_text=True, first_position=False)


def test_a_target_needs_logits() -> None:
    with pytest.raises(PassError, match="no divergence"):
        removed("bert", target_kl=0.1)


@pytest.mark.parametrize("schedule", ["all", "progressive"])
def test_norms_that_wait_for_healing_are_left_to_it(schedule: Any) -> None:
    marked = RemoveNorms(schedule="progressive")(canonical("gpt2"), context()).program
    with pytest.raises(PassError, match="waits for heal"):
        RemoveNorms(schedule=schedule)(marked, context())


def test_what_cannot_be_folded_stays_a_norm_and_is_named() -> None:
    before = QuantizeWeights(bits=8, group_size=8)(canonical("gpt2"), context()).program
    result = frozen(
        before.editable(), {views(Norm, before)[0].node.name: Constant(1.0)}, untie=True
    )
    assert len(views(Norm, result.program)) == len(views(Norm, before))
    assert "stays live: %quantized_linear_default reads it" in str(result.remarks[-1])
