"""Norms that become RepBN while a model heals: the switch, its marks, and what training leaves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from modelathe.ir import (
    BatchNorm,
    Norm,
    PassError,
    Program,
    capture,
    fingerprint,
    load_program,
    marks_of,
    save_program,
    to_text,
)
from modelathe.passes import (
    ConvertDtype,
    FoldRepBatchNorms,
    Heal,
    PassContext,
    PassResult,
    Pipeline,
    RemoveNorms,
    ReplaceNorms,
)
from modelathe.passes.analysis.channel_moments import norm_moments
from modelathe.passes.norms.rep_batch_norm import EPS, RepBatchNorm, RepParameters
from modelathe.passes.norms.rep_switch import RepSwitch, share_at
from modelathe.passes.outputs import predictions
from modelathe.passes.training.switches import by_key, put_switches
from support.models import MODELS, canonical
from support.numeric import EXACT, assert_same_bits, relative_error, worst_error
from support.training import SHORT, context, stop_training, text

PASS = ReplaceNorms(schedule="progressive")


def norms(program: Program) -> list[Norm]:
    nodes = [node for graph in program.graphs.values() for node in graph.nodes]
    return [norm for node in nodes if (norm := Norm.match(node))]


def reps(program: Program) -> list[RepBatchNorm]:
    nodes = [node for graph in program.graphs.values() for node in graph.nodes]
    return [rep for node in nodes if (rep := RepBatchNorm.match(node))]


def marked(name: str, **options: Any) -> Program:
    return ReplaceNorms(schedule="progressive", **options)(canonical(name), context()).program


def switches(program: Program) -> Mapping[fx.Node, RepSwitch]:
    """Return the switches of a program's norms as healing begins, none in its place yet."""
    nodes = [norm.node for norm in norms(program)]
    made = PASS.make_switches(program, nodes, context())
    return {node: s for node, s in made.items() if isinstance(s, RepSwitch)}


def switch_of(model: str, share: float) -> tuple[RepSwitch, fx.Node]:
    """Return the switch of the first norm of a model, made uneven, and the norm."""
    node, switch = next(iter(switches(canonical(model)).items()))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in (switch.gain, switch.bias, switch.multiple, switch.mean):
            value.add_(torch.randn(value.shape, generator=generator))
        switch.variance.mul_(torch.rand(switch.variance.shape, generator=generator) + 0.5)
        switch.share.fill_(share)
    return switch.eval(), node


def arguments(program: Program, norm: Norm) -> tuple[Any, ...]:
    """Return what a norm is called with behind its input, weights loaded."""
    return fx.node.map_arg(norm.node.args[1:], lambda node: program.weight(node).load())  # type: ignore[no-any-return]


def values() -> Tensor:
    return 3 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(5)) + 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_switch_that_was_not_turned_is_the_norm(model: str, training: bool) -> None:
    switch, node = switch_of(model, 1.0)
    norm = Norm.match(node)
    assert norm is not None
    rest = arguments(canonical(model), norm)
    found = switch.train(training)(values(), *rest)
    assert torch.equal(found, node.target(values(), *rest))  # type: ignore[operator]
    assert switch.turned == 0.0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_turned_switch_is_the_rep_batch_norm(model: str, training: bool) -> None:
    switch, node = switch_of(model, 0.0)
    norm = Norm.match(node)
    assert norm is not None
    plain, held = nn.BatchNorm1d(32, EPS).eval(), switch.rep
    state = {"weight": held.gain, "bias": held.bias, "running_mean": held.mean}
    plain.load_state_dict({**state, "running_var": held.variance}, strict=False)
    x = values()
    expected = plain(x.flatten(0, 1)).view_as(x) + held.alpha * x
    found = switch.train(training)(x, *arguments(canonical(model), norm))
    assert torch.equal(found, expected)
    assert switch.turned == 1.0


def test_in_between_it_is_both_by_their_shares() -> None:
    switch, node = switch_of("gpt2", 0.25)
    norm = Norm.match(node)
    assert norm is not None
    rest, found = arguments(canonical("gpt2"), norm), []
    for share in (1.0, 0.25, 0.0):
        switch.share.fill_(share)
        found.append(switch(values(), *rest))
    torch.testing.assert_close(found[1], 0.25 * found[0] + 0.75 * found[2])


def test_training_normalises_with_the_batch_and_keeps_running_statistics() -> None:
    switch, node = switch_of("gpt2", 0.5)
    norm = Norm.match(node)
    assert norm is not None
    rest, x = arguments(canonical("gpt2"), norm), values()
    mean, variance = switch.mean.clone(), switch.variance.clone()
    judged = switch(x, *rest)
    assert torch.equal(switch.mean, mean)
    trained = switch.train()(x, *rest)
    assert not torch.allclose(trained, judged)
    rows = x.flatten(0, 1)
    torch.testing.assert_close(switch.mean, 0.9 * mean + 0.1 * rows.mean(0))
    torch.testing.assert_close(switch.variance, 0.9 * variance + 0.1 * rows.var(0))


def test_statistics_are_fixed_once_it_is_turned() -> None:
    switch, node = switch_of("gpt2", 0.0)
    norm = Norm.match(node)
    assert norm is not None
    mean = switch.mean.clone()
    switch.train()(values(), *arguments(canonical("gpt2"), norm))
    assert torch.equal(switch.mean, mean)


def test_one_vector_alone_has_no_statistics_to_train_with() -> None:
    switch, node = switch_of("gpt2", 0.5)
    norm = Norm.match(node)
    assert norm is not None
    one, rest = values()[:1, :1], arguments(canonical("gpt2"), norm)
    judged = switch(one, *rest)
    assert torch.equal(switch.train()(one, *rest), judged)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_it_starts_from_the_line_of_least_squares_of_every_norm(name: str) -> None:
    program, windows = canonical(name), text().tokens
    graphs = {graph: name for name, graph in program.graphs.items()}
    made = switches(program)
    assert len(made) == len(norms(program))
    for node, switch in made.items():
        moments = norm_moments(program, program, graphs[node.graph], node, windows, "cpu")
        wanted, held = RepParameters.fitted(moments), switch.rep
        for part in ("gain", "bias", "mean", "variance", "alpha"):
            assert relative_error(getattr(wanted, part), getattr(held, part)) <= 1e-6


def test_a_step_on_alpha_moves_results_as_much_however_large_the_values_are() -> None:
    node, switch = next(iter(switches(canonical("gpt2")).items()))
    norm = Norm.match(node)
    assert norm is not None
    start = switch.rep
    moved = []
    for size in (1.0, 100.0):
        large = dataclasses.replace(start, variance=start.variance * size**2)
        switch = RepSwitch(norm, large)
        before = float(switch.rep.alpha)
        with torch.no_grad():
            switch.multiple.add_(1.0)
        moved.append((float(switch.rep.alpha) - before) * float(large.variance.max().sqrt()))
    assert moved == pytest.approx([1.0, 1.0], rel=1e-2)


@pytest.mark.parametrize(
    ("step", "steps", "share"),
    [(0, 100, 1.0), (20, 100, 0.5), (39, 100, 0.025), (40, 100, 0.0), (99, 100, 0.0), (0, 1, 1.0)],
)
def test_the_share_falls_to_nothing_in_two_fifths_of_a_run(
    step: int, steps: int, share: float
) -> None:
    assert share_at(step, steps) == pytest.approx(share)
    made = switches(canonical("gpt2"))
    PASS.turn(made, step, steps, 0.0)
    assert [float(switch.share) for switch in made.values()] == pytest.approx([share] * len(made))


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_marks_change_no_output_and_are_saved(name: str, tmp_path: Path) -> None:
    before, after = canonical(name), marked(name)
    assert fingerprint(after) != fingerprint(before)
    assert len(norms(after)) == len(norms(before))
    assert set(after.weights) == set(before.weights)
    save_program(after, tmp_path)
    again = load_program(tmp_path)
    assert to_text(again) == to_text(after)
    found = [marks_of(norm.node)["switch"] for norm in norms(again)]
    assert set(found) == {"replace-norms{schedule=progressive}"}


def test_a_pipeline_judges_a_marked_program_equal() -> None:
    pipeline = Pipeline([PASS], context=context())
    assert pipeline(canonical("gpt2")).steps[-1].measured.kl == pytest.approx(0.0, abs=1e-9)


def test_marking_measures_nothing_and_healing_reads_no_more_than_asked_for() -> None:
    program = ReplaceNorms(schedule="progressive")(canonical("gpt2"), PassContext()).program
    few = ReplaceNorms(schedule="progressive", tokens=8)
    (node, *_) = [norm.node for norm in norms(program)]
    switch = few.make_switches(program, [node], context())[node]
    assert isinstance(switch, RepSwitch)
    moments = norm_moments(program, program, "main", node, text().tokens[:1], "cpu")
    assert relative_error(moments.mean, switch.mean) <= 1e-6


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama-bf16"])
def test_healing_replaces_every_norm_and_what_is_left_can_be_folded(name: str) -> None:
    before = marked(name)
    result = Heal(**SHORT)(before, context())
    assert not norms(result.program)
    assert len(reps(result.program)) == len(norms(before))
    nodes = [node for graph in result.program.graphs.values() for node in graph.nodes]
    assert not any(marks_of(node) for node in nodes)
    folded = FoldRepBatchNorms()(result.program, context()).program
    assert not any(BatchNorm.match(node) for g in folded.graphs.values() for node in g.nodes)
    assert result.details["curve"][-1]["turned"] == 1.0


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_what_is_left_computes_what_the_turned_switches_do(name: str) -> None:
    before = marked(name)
    trainee = before.editable()
    (made,) = put_switches(trainee, context()).values()
    for switch in made.values():
        assert isinstance(switch, RepSwitch)
        switch.eval().share.fill_(0.0)
        alpha = switch.rep.alpha
        switch.double()
        with torch.no_grad():  # float32, as it is stored
            switch.multiple.copy_(alpha.double() * switch.scale)
    keyed = by_key(trainee, made)
    settled = PASS.settle(before.editable(), keyed).program
    outputs = []
    for program in (trainee, settled):
        run = functools.partial(program.run, dtype=torch.float64)
        outputs.append({"y": predictions(program, {"input_ids": text(2).tokens}, run)})
    assert worst_error(*outputs) <= EXACT


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_rest_of_a_run_makes_up_for_what_turning_costs(name: str) -> None:
    curve = Heal(**SHORT)(marked(name), context()).details["curve"]
    assert curve[0]["text"] == pytest.approx(0.0, abs=1e-5)
    turned = [point["text"] for point in curve if point["turned"] == 1.0]
    assert turned[-1] < 0.8 * turned[0]


@pytest.mark.parametrize("weights", ["norms", "lora"])
def test_switches_learn_whatever_else_does(weights: str) -> None:
    program = marked("gpt2")
    start = {key: s.rep for key, s in by_key(program, switches(program)).items()}
    rank = {"rank": 2} if weights == "lora" else {}
    result = Heal(**{**SHORT, "weights": weights, **rank})(program, context()).program
    (first, *_) = reps(result)
    assert isinstance(first.alpha, fx.Node)
    (held, *_) = start.values()
    assert not torch.equal(result.weight(first.alpha).load(), held.alpha)
    assert first.norm.gain is not None
    assert not torch.equal(result.weight(first.norm.gain).load(), held.gain)
    assert not result.weights.is_parameter(str(first.norm.mean.target))


def test_too_short_a_run_leaves_norms_live_and_says_so() -> None:
    result = Heal(**{**SHORT, "steps": 1})(marked("gpt2"), context())
    assert len(norms(result.program)) == len(norms(canonical("gpt2")))
    assert not any(marks_of(norm.node) for norm in norms(result.program))
    missed = [remark.message for remark in result.remarks if remark.kind == "missed"]
    assert missed == ["still live when healing ended: the run was too short"] * 5


@pytest.mark.parametrize("steps", [3, 8])
def test_a_stopped_run_goes_on_to_the_same_bits(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppedError(Exception):
        pass

    before, pass_ = marked("gpt2"), Heal(**SHORT)
    whole = pass_(before, context())
    stop_training(monkeypatch, steps, StoppedError)
    with pytest.raises(StoppedError):
        pass_(before, context(state=tmp_path))
    stop_training(monkeypatch, None, StoppedError)
    rest = pass_(before, context(state=tmp_path))
    assert fingerprint(rest.program) == fingerprint(whole.program)
    loaded = [{n: p.weights[n].load() for n in p.weights} for p in (rest.program, whole.program)]
    assert_same_bits(*loaded)
    assert rest.details == whole.details


def test_a_run_that_was_stopped_behind_its_last_step_still_settles(tmp_path: Path) -> None:
    first, again = (Heal(**SHORT)(marked("gpt2"), context(state=tmp_path)) for _ in range(2))
    assert fingerprint(again.program) == fingerprint(first.program)
    assert not norms(again.program)


def test_globs_choose_what_is_marked_and_the_rest_stays_a_norm() -> None:
    program = marked("llama", only=("layers.1",), ignore=("post_attention_layernorm",))
    found = [norm.node for norm in norms(program) if marks_of(norm.node)]
    assert len(found) == 1
    result = Heal(**SHORT)(program, context()).program
    assert len(norms(result)) == len(norms(program)) - 1


@pytest.mark.parametrize("schedule", ["all", "progressive"])
def test_norms_that_another_pass_has_marked_are_refused(schedule: Any) -> None:
    removing = RemoveNorms(schedule="progressive", untie=True)
    before = removing(canonical("gpt2"), context()).program
    result: PassResult = ReplaceNorms(schedule=schedule)(before, context())
    assert fingerprint(result.program) == fingerprint(before)
    why = "already marked for heal, by remove-norms{schedule=progressive untie=true}"
    assert {remark.message for remark in result.remarks} == {why}


def test_marking_twice_changes_nothing() -> None:
    once = marked("gpt2")
    twice = PASS(once, context())
    assert not twice.modified
    assert fingerprint(twice.program) == fingerprint(once)


def test_what_float16_has_no_numbers_for_is_refused_before_training() -> None:
    model: Any = MODELS["token-norm"].module()
    with torch.no_grad():
        model.embed.weight.mul_(3000)
    found = capture(model.half(), (torch.zeros(2, 3, dtype=torch.int64),))
    program = PASS(found, context()).program
    with pytest.raises(PassError, match="varies more than"):
        put_switches(program.editable(), context())


def test_a_norm_whose_rep_batch_norm_outgrew_float16_stays() -> None:
    program = ConvertDtype(to="float16")(canonical("gpt2"), context()).program
    before = PASS(program, context()).program
    made = switches(before)
    first = next(iter(made.values()))
    first.variance.fill_(1e6)
    for switch in made.values():
        switch.share.fill_(0.0)
    settled = PASS.settle(before.editable(), by_key(before, made))
    (why,) = [str(remark) for remark in settled.remarks if remark.kind == "missed"]
    assert "varies more than torch.float16 has numbers for" in why
    assert len(norms(settled.program)) == 1


def test_other_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="schedule is all or progressive"):
        ReplaceNorms(schedule="slowly")  # type: ignore[arg-type]


def test_a_model_without_tokens_is_refused() -> None:
    with pytest.raises(PassError, match="reads no tokens"):
        PASS(canonical("vit"), context())
