"""Norms that become RepBN while a model heals: their marks, and what training leaves."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from modelathe.ir import (
    BatchNorm,
    Norm,
    PassError,
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
from modelathe.passes.norms.rep_batch_norm import RepBatchNorm
from modelathe.passes.norms.rep_switch import RepSwitch
from modelathe.passes.outputs import predictions
from modelathe.passes.training.switches import by_key, put_switches
from support.models import MODELS, canonical
from support.numeric import EXACT, assert_same_bits, relative_error, worst_error
from support.rep_switches import PASS, marked, switches
from support.training import SHORT, context, stop_training, text
from support.views import views


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_marks_change_no_output_and_are_saved(name: str, tmp_path: Path) -> None:
    before, after = canonical(name), marked(name)
    assert fingerprint(after) != fingerprint(before)
    assert len(views(Norm, after)) == len(views(Norm, before))
    assert set(after.weights) == set(before.weights)
    save_program(after, tmp_path)
    again = load_program(tmp_path)
    assert to_text(again) == to_text(after)
    found = [marks_of(norm.node)["switch"] for norm in views(Norm, again)]
    assert set(found) == {"replace-norms{schedule=progressive}"}


def test_a_pipeline_judges_a_marked_program_equal() -> None:
    pipeline = Pipeline([PASS], context=context())
    assert pipeline(canonical("gpt2")).steps[-1].measured.kl == pytest.approx(0.0, abs=1e-9)


def test_marking_measures_nothing_and_healing_reads_no_more_than_asked_for() -> None:
    program = ReplaceNorms(schedule="progressive")(canonical("gpt2"), PassContext()).program
    few = ReplaceNorms(schedule="progressive", tokens=8)
    (node, *_) = [norm.node for norm in views(Norm, program)]
    switch = few.make_switches(program, [node], context())[node]
    assert isinstance(switch, RepSwitch)
    moments = norm_moments(program, program, "main", node, text().tokens[:1], "cpu")
    assert relative_error(moments.mean, switch.mean) <= 1e-6


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama-bf16"])
def test_healing_replaces_every_norm_and_what_is_left_can_be_folded(name: str) -> None:
    before = marked(name)
    result = Heal(**SHORT)(before, context())
    assert not views(Norm, result.program)
    assert len(views(RepBatchNorm, result.program)) == len(views(Norm, before))
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
    (first, *_) = views(RepBatchNorm, result)
    assert isinstance(first.alpha, fx.Node)
    (held, *_) = start.values()
    assert not torch.equal(result.weight(first.alpha).load(), held.alpha)
    assert first.norm.gain is not None
    assert not torch.equal(result.weight(first.norm.gain).load(), held.gain)
    assert not result.weights.is_parameter(str(first.norm.mean.target))


def test_too_short_a_run_leaves_norms_live_and_says_so() -> None:
    result = Heal(**{**SHORT, "steps": 1})(marked("gpt2"), context())
    assert len(views(Norm, result.program)) == len(views(Norm, canonical("gpt2")))
    assert not any(marks_of(norm.node) for norm in views(Norm, result.program))
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
    assert not views(Norm, again.program)


def test_globs_choose_what_is_marked_and_the_rest_stays_a_norm() -> None:
    program = marked("llama", only=("layers.1",), ignore=("post_attention_layernorm",))
    found = [norm.node for norm in views(Norm, program) if marks_of(norm.node)]
    assert len(found) == 1
    result = Heal(**SHORT)(program, context()).program
    assert len(views(Norm, result)) == len(views(Norm, program)) - 1


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
    assert len(views(Norm, settled.program)) == 1


def test_other_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="schedule is all or progressive"):
        ReplaceNorms(schedule="slowly")  # type: ignore[arg-type]


def test_a_model_without_tokens_is_refused() -> None:
    with pytest.raises(PassError, match="reads no tokens"):
        PASS(canonical("vit"), context())
