"""Passes in a row: what runs, what is noted, what is stopped."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from modelathe.ir import (
    DataError,
    FidelityError,
    PassError,
    Program,
    SpecSyntaxError,
    VerifyError,
    fingerprint,
    stored_bytes,
)
from modelathe.passes import (
    Budget,
    Canonicalize,
    ConvertDtype,
    FoldNorms,
    Pass,
    PassContext,
    PassResult,
    Pipeline,
    PruneBlocks,
    QuantizeWeights,
    Step,
    TieBlocks,
)
from support.models import canonical, context, program
from support.stand_ins import AddsOutput, Breaks, Claims, Failing, Idle, Scale


def test_a_text_that_cannot_be_read_is_found_before_any_pass() -> None:
    pipeline = Pipeline([Failing()], context=PassContext(check_text=iter(["a text"])))
    with pytest.raises(DataError, match="the model has no tokenizer"):
        pipeline(program("llama"))


def test_canonicalize_runs_first_whether_it_is_named_or_not() -> None:
    implied = Pipeline([FoldNorms()], context=context())(program("norm-mlp"))
    named = Pipeline([Canonicalize(), FoldNorms()], context=context())(program("norm-mlp"))
    for result in (implied, named):
        assert [step.pass_.name for step in result.steps] == ["canonicalize", "fold-norms"]
        assert result.program.origin.passes == ("canonicalize", "fold-norms")
    assert fingerprint(implied.program) == fingerprint(named.program)


def test_a_canonicalize_that_did_nothing_is_not_remembered() -> None:
    result = Pipeline([FoldNorms()], context=context())(program("norm-linears"))
    assert result.program.origin.passes == ("fold-norms",)


def test_the_input_is_left_alone() -> None:
    before = fingerprint(program("tied-blocks"))
    Pipeline([FoldNorms(), Scale()], context=context())(program("tied-blocks"))
    assert fingerprint(program("tied-blocks")) == before


def test_a_step_holds_what_happened() -> None:
    seen: list[Step] = []
    pipeline = Pipeline([FoldNorms(), Scale()], context=context())
    result = pipeline(program("llama"), observers=(seen.append,))
    assert tuple(seen) == result.steps
    first, fold, scale = result.steps
    assert first.before is program("llama")
    assert fold.before is first.after
    assert fold.measured.error is not None
    assert scale.measured.kl is not None
    assert scale.seconds >= 0
    assert result.measured == scale.measured
    summary = scale.summary()
    assert summary["pass"].endswith("Scale")
    assert summary["fidelity"] == "lossy"
    assert summary["measured"].keys() == {
        *("tokens", "kl", "top1_agreement", "perplexity", "reference_perplexity"),
    }


def test_the_result_remembers_how_it_was_made() -> None:
    result = Pipeline([Scale()], context=context(seed=3))(program("llama"))
    record = result.program.origin.record
    assert record["seed"] == 3
    assert [step["pass"].rpartition(":")[2] for step in record["steps"]] == [
        "canonicalize",
        "Scale",
    ]
    assert record["captured"]["bytes"] == stored_bytes(program("llama"))
    assert record["data"] == result.data
    assert set(result.data) == {"check"}
    assert result.data["check"]["windows"] == [2, 12]


def test_a_pipeline_goes_on_where_another_ended() -> None:
    first = Pipeline([FoldNorms()], context=context())(program("llama")).program
    second = Pipeline([Scale(factor=1.0001)], context=context())(first)
    passes = [text.rpartition(":")[2] for text in second.program.origin.passes]
    assert passes == ["canonicalize", "fold-norms", "Scale{factor=1.0001}"]
    assert len(second.program.origin.record["steps"]) == 4
    kl = second.steps[-1].measured.kl
    assert kl is not None  # measured against the captured program, far more than against `first`
    whole = Pipeline([FoldNorms(), Scale(factor=1.0001)], context=context())(program("llama"))
    assert whole.steps[-1].measured.kl == pytest.approx(kl)


def test_without_checks_nothing_is_judged_or_measured() -> None:
    result = Pipeline([Scale()], context=context(), check=False)(program("llama"))
    assert [step.measured.known() for step in result.steps] == [{}, {}]
    assert result.measured.known() == {}
    assert result.data == {}


def test_an_idle_pass_is_not_judged() -> None:
    result = Pipeline([Idle()], context=context())(program("norm-linears"))
    assert result.steps[-1].measured.known() == {}
    assert [str(remark) for remark in result.steps[-1].remarks] == ["missed: main: nothing to do"]


@pytest.mark.parametrize(
    ("passes", "kind", "message", "note"),
    [
        ([Idle(), Failing()], KeyError, "of its own", "in pass 2 of 2: .*Failing"),
        ([Claims()], PassError, "not what it should be", "in pass 1 of 1: .*Claims"),
        ([AddsOutput()], PassError, "adds-output: changed the signature", "AddsOutput"),
        ([Breaks()], VerifyError, "has no shape and dtype", "Breaks"),
        ([Canonicalize(), Failing()], KeyError, "of its own", "in pass 1 of 1: "),
    ],
)
def test_an_error_keeps_its_type_and_gets_a_note(
    passes: list[Pass], kind: type[Exception], message: str, note: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        Pipeline(passes, context=context())(program("norm-linears"))
    (text,) = caught.value.__notes__
    assert re.search(note, text)


def test_a_pass_may_refuse_a_program() -> None:
    with pytest.raises(PassError, match="claims: there is no norm"):
        Claims()(program("hand-written"))


def test_claims_are_checked_of_what_changed_only() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Quiet(Claims):
        def run(self, program: Program, context: PassContext) -> PassResult:
            return PassResult(program)

    assert not Quiet()(program("norm-linears")).modified


def test_a_budget_stops_a_lossy_pass_and_names_it() -> None:
    measured = Pipeline([Scale()], context=context())(program("llama")).measured
    assert measured.kl
    tight, wide = (Budget(max_kl=measured.kl * share) for share in (0.9, 1.1))
    with pytest.raises(FidelityError, match=r"scale: KL .* nats, at most") as caught:
        Pipeline([Scale()], context=context(), budget=tight)(program("llama"))
    assert "in pass 1 of 1" in caught.value.__notes__[0]
    Pipeline([Scale()], context=context(), budget=wide)(program("llama"))


def test_a_budget_is_judged_at_the_end_too() -> None:
    """The sum of two steps may break what each of them keeps: it is measured from the start."""
    result = Pipeline([Scale(), FoldNorms()], context=context(), budget=Budget(max_kl=50.0))
    made = result(program("llama"))
    assert made.measured.kl == pytest.approx(made.steps[1].measured.kl, rel=1e-3)


def test_a_budget_alone_measures_an_exact_pipeline() -> None:
    made = Pipeline([FoldNorms()], context=context(), budget=Budget(max_kl=1e-3))(program("llama"))
    assert made.measured.kl is not None
    assert made.measured.kl < 1e-6


def test_a_pass_that_ruins_the_model_is_warned_about_and_not_stopped() -> None:
    made = Pipeline([Scale(factor=300.0)], context=context())(program("llama"))
    assert made.measured.kl is not None
    (warning,) = made.steps[-1].warnings
    assert warning.startswith(f"scale: KL {made.measured.kl:.2f} nats per token")


def test_text_and_objects_are_one() -> None:
    text = "fold-norms,prune-blocks{blocks=1},quantize-weights{bits=8 group-size=-1}"
    pipeline = Pipeline.parse(text)
    assert str(pipeline) == text
    assert pipeline.passes == (
        FoldNorms(),
        PruneBlocks(blocks=(1,)),
        QuantizeWeights(bits=8, group_size=-1),
    )
    assert str(Pipeline([])) == ""


def test_text_takes_context_and_limits() -> None:
    given = context()
    pipeline = Pipeline.parse("", context=given, budget=Budget(max_kl=1.0), check=False)
    assert (pipeline.context, pipeline.budget, pipeline.check) == (given, Budget(max_kl=1.0), False)


def test_an_unknown_pass_is_refused() -> None:
    with pytest.raises(SpecSyntaxError, match="did you mean 'fold-norms'"):
        Pipeline.parse("fold-norm")


def test_the_main_job_on_a_sliding_window_decoder() -> None:
    passes = [
        FoldNorms(),
        PruneBlocks(blocks=(1,)),
        TieBlocks(unique=1),
        QuantizeWeights(bits=8, group_size=8),
        ConvertDtype(to="bfloat16"),
    ]
    result = Pipeline(passes, context=context())(program("gemma3"))
    assert len(result.steps) == 6
    assert stored_bytes(result.program) < stored_bytes(canonical("gemma3")) / 3
    assert result.program.config["num_hidden_layers"] == 2
    assert result.program.config["layer_types"] == ["sliding_attention"] * 2
