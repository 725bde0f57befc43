"""What is measured, what is judged, and which node is blamed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from modelathe.ir import SCRATCH, DataError, FidelityError, Linear, Program
from modelathe.ir.computed import _write
from modelathe.passes import Budget, Measured
from modelathe.passes.consistency import judge_consistency, judge_finite
from modelathe.passes.fidelity import (
    EXACT,
    Reference,
    forward,
    judge_bitwise,
    judge_rounding,
    relative_error,
    same_bits,
    tolerance,
)
from modelathe.passes.outputs import rows_of
from support.edits import EDITS
from support.models import canonical, context, program
from support.views import views

NAN, INF = float("nan"), float("inf")
aten = torch.ops.aten


def scaled(name: str, factor: float, which: int = 0) -> Program:
    """A copy in which the weight of one linear is multiplied by a factor."""
    copy = canonical(name).editable()
    view = views(Linear, copy)[which]
    value = copy.weight(view.weight).load() * factor
    added = copy.add_weight("scaled", value)
    view.set_weights(copy.weight_node(copy.graph, added, before=view.node), view.bias)
    copy.clean()
    return copy


@pytest.mark.parametrize(
    ("expected", "found", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [1.5, -4.0], 0.125),
        ([0.0, 0.0], [0.0, 0.5], 0.5),
        ([NAN, 1.0], [NAN, 1.0], 0.0),
        ([NAN, 1.0], [1.0, 1.0], INF),
        ([1.0, 1.0], [NAN, 1.0], INF),
        ([INF, 1.0], [INF, 1.0], 0.0),
        ([INF, 1.0], [-INF, 1.0], INF),
        ([1.0], [1.0, 1.0], INF),
        ([], [], 0.0),
    ],
)
def test_errors_are_relative_to_the_largest_value(
    expected: list[float], found: list[float], error: float
) -> None:
    assert relative_error(torch.tensor(expected), torch.tensor(found)) == error


def test_whole_numbers_are_equal_or_not() -> None:
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == INF


def test_the_same_bits_have_one_dtype() -> None:
    assert same_bits(torch.tensor([NAN, 1.0]), torch.tensor([NAN, 1.0]))
    assert not same_bits(torch.tensor([1.0]), torch.tensor([1.0]).double())
    assert not same_bits(torch.tensor([1.0]), torch.tensor([NAN]))


def test_a_value_that_was_rounded_by_the_pass_is_allowed_a_few_units() -> None:
    before, copy = canonical("norm-mlp"), canonical("norm-mlp").editable()
    assert tolerance(before, copy) == EXACT
    copy.add_weight("more", torch.ones(3).bfloat16())
    assert tolerance(before, copy) == 16 * 2**-7
    copy.weights.keep_only(set(before.weights))
    copy.add_weight("whole", torch.ones(3, dtype=torch.int64))
    assert tolerance(before, copy) == EXACT


def test_equal_programs_are_equal() -> None:
    for name in ("llama", "t5", "bert", "hand-written"):
        assert judge_bitwise(canonical(name), canonical(name).editable(), "x").error == 0
    assert judge_rounding(program("llama"), canonical("llama"), "x").error <= EXACT


@pytest.mark.parametrize("judge", [judge_bitwise, judge_rounding])
@pytest.mark.parametrize("factor", [1.0001, 0.0, NAN])
def test_a_moved_output_names_itself_and_the_node(
    judge: Callable[[Program, Program, str], Measured], factor: float
) -> None:
    message = r"here: output output is .*, first wrong at %linear_1 \(aten.linear of down\)"
    with pytest.raises(FidelityError, match=message) as caught:
        judge(canonical("norm-mlp"), scaled("norm-mlp", factor, 1), "here")
    assert caught.value.remedy


def test_an_output_that_is_gone_is_moved() -> None:
    copy = canonical("norm-mlp").editable()
    copy.signatures["main"] = copy.signature.renamed({"output": "result"})
    for judge in (judge_bitwise, judge_rounding):
        with pytest.raises(FidelityError, match="output output is"):
            judge(canonical("norm-mlp"), copy, "here")


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert", "vit", "t5", "norm-mlp"])
def test_a_right_program_is_consistent(name: str) -> None:
    judge_consistency(program(name), canonical(name), "here")


def test_what_a_model_never_did_is_not_asked_of_it() -> None:
    """A model that ignores its mask sees padding before and after a pass."""
    blind = canonical("bert").editable()
    EDITS["ignore_the_mask"](blind, blind.graph)
    blind.clean()
    judge_consistency(blind, blind.editable(), "here")
    with pytest.raises(FidelityError, match="here: padding changes"):
        judge_consistency(canonical("bert"), blind, "here")


def test_nan_after_a_lossy_pass_is_an_error_and_names_the_node() -> None:
    before, after = canonical("norm-mlp"), scaled("norm-mlp", NAN)
    reference = Reference(before, context())
    measured = reference.measure(after)
    with pytest.raises(FidelityError, match=r"here: .* nan or inf, first at %linear \(aten"):
        judge_finite(measured, before, after, "here")
    judge_finite(measured, after, after, "here")
    judge_finite(reference.measure(before), before, before, "here")


def test_a_program_is_no_way_from_itself() -> None:
    measured = Reference(canonical("llama"), context()).measure(canonical("llama"))
    assert (measured.kl, measured.top1_agreement) == (0.0, 1.0)
    assert measured.perplexity == measured.reference_perplexity
    assert measured.tokens == 2 * 11
    encoder = Reference(canonical("bert"), context()).measure(canonical("bert"))
    assert encoder.cosine == pytest.approx(1.0, abs=1e-12)
    assert encoder.known().keys() == {"cosine", "cosine_min"}


@pytest.mark.parametrize("name", ["vit", "norm-mlp", "t5", "albert"])
def test_every_kind_of_model_can_be_measured(name: str) -> None:
    measured = Reference(canonical(name), context()).measure(canonical(name))
    assert measured.kl == 0 or measured.cosine == pytest.approx(1.0, abs=1e-12)


def test_figures_are_those_of_the_outputs() -> None:
    before, after = canonical("llama"), scaled("llama", 1.5)
    rows = context().check_tokens_of(before)
    assert rows is not None
    expected, found = (forward(each, {"input_ids": rows.tokens}) for each in (before, after))
    assert expected.shape == (2, 12, 48)
    p, q = (t[:, :-1].double().log_softmax(-1) for t in (expected, found))
    measured = Reference(before, context()).measure(after)
    assert measured.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()))
    nats = -q.gather(-1, rows.tokens[:, 1:, None]).mean()
    assert measured.perplexity == pytest.approx(math.exp(nats))
    assert measured.top1_agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())


@pytest.mark.parametrize("limit", [SCRATCH.limit, 0])
def test_the_reference_is_computed_once_and_kept_in_memory_or_a_file(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Program] = []
    written: list[Tensor] = []

    def write(path: Path, value: Tensor) -> None:
        written.append(value)
        _write(path, value)

    real = Program.run

    def run(self: Program, *args: object, **kwargs: object) -> dict[str, Tensor]:
        runs.append(self)
        return real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Program, "run", run)
    monkeypatch.setattr(SCRATCH, "limit", limit)
    monkeypatch.setattr("modelathe.ir.computed._write", write)
    before, after = canonical("llama"), canonical("llama").editable()
    reference = Reference(before, context())
    assert reference.measure(after) == reference.measure(after)
    assert [each is before for each in runs].count(True) == 1
    assert len(written) == (0 if limit else 1)


TOKENS = Measured(kl=0.2, top1_agreement=0.9, perplexity=11.0, reference_perplexity=10.0)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(max_kl=0.1), "here: KL 0.2 nats, at most 0.1 allowed"),
        (Budget(max_perplexity_increase=0.05), "perplexity rose by 10.00%, at most 5.00% allowed"),
        (Budget(min_agreement=0.95), "agreement 0.9000, at least 0.95 asked for"),
    ],
)
def test_a_broken_limit_is_an_error(budget: Budget, message: str) -> None:
    with pytest.raises(FidelityError, match=message) as caught:
        budget.judge(TOKENS, "here")
    assert caught.value.remedy


@pytest.mark.parametrize(
    "budget",
    [Budget(), Budget(max_kl=0.2), Budget(max_perplexity_increase=0.11), Budget(min_agreement=0.9)],
)
def test_a_limit_that_holds_is_silent(budget: Budget) -> None:
    budget.judge(TOKENS, "here")


@pytest.mark.parametrize("budget", [Budget(max_kl=9.0), Budget(min_agreement=0.0)])
def test_nan_breaks_every_limit(budget: Budget) -> None:
    with pytest.raises(FidelityError):
        budget.judge(replace(TOKENS, kl=NAN, top1_agreement=NAN), "here")


def test_agreement_means_cosine_where_there_are_no_logits() -> None:
    cosine = Measured(cosine=0.98, cosine_min=0.9)
    Budget(min_agreement=0.97).judge(cosine, "here")
    with pytest.raises(FidelityError):
        Budget(min_agreement=0.99).judge(cosine, "here")
    with pytest.raises(DataError, match="max-kl: this kind of model has no such figure"):
        Budget(max_kl=1.0).judge(cosine, "here")


@pytest.mark.parametrize(
    "options",
    [{"max_kl": -1.0}, {"max_perplexity_increase": -0.1}, {"min_agreement": 1.5}, {"max_kl": NAN}],
)
def test_an_impossible_limit_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"at least 0|a share from 0 to 1"):
        Budget(**options)


def test_rows_of_an_encoder_are_means_over_positions() -> None:
    first = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])
    assert rows_of("encoder", first).tolist() == [[2.0, 4.0]]
    assert rows_of("module", first).tolist() == [[1.0, 2.0, 3.0, 6.0]]


def test_rows_are_made_on_the_device_of_what_was_predicted() -> None:
    with FakeTensorMode():  # a device that need not be there
        rows = rows_of("encoder", torch.empty(2, 3, 4, device="cuda"))
    assert rows.device.type == "cuda"
