"""What holds for every pass on every tiny model.  A new pass is covered by being registered."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from modelathe.ir import (
    ModelatheError,
    PassError,
    Program,
    fingerprint,
    load_program,
    save_program,
    to_text,
    verify,
)
from modelathe.passes import (
    ALL_PASSES,
    Fidelity,
    Pass,
    PassResult,
    Pipeline,
    QuantizeWeights,
    all_passes,
    parse,
    to_spec,
)
from modelathe.passes.consistency import judge_consistency
from modelathe.passes.describe import describe, undocumented
from support.feeds import Inputs, feed
from support.models import MODELS, canonical, context, program
from support.numeric import EXACT, assert_same_bits, rounding, worst_error

# Legal options of the passes that cannot run on most models without any.
REQUIRED: dict[str, dict[str, object]] = {
    "prune-blocks": {"blocks": (1,)},
    "tie-blocks": {"unique": 1},
    "equalize": {"group_size": 8, "grid": 2, "refine": 1},
    "search-bits": {"target_bits": 4, "group_size": 8, "pairs": 1, "tables": 1},
    "quantize-weights": {"method": "rtn", "group_size": 8, "embedding_bits": 8},
    "convert-dtype": {"to": "bfloat16"},
    "heal": {"steps": 1, "batch": 24, "length": 12, "mix": 0.0, "weights": "norms"},
}
# Why a second run changes something again.
RUNS_AGAIN = {
    "prune-blocks": "the blocks that are left are counted anew, and one more goes",
    "heal": "it trains on",
    "equalize": "scales are searched for anew, from those that there are",
}

# Passes whose options put calls into programs that the ones above do not.
_FEW = {"bits": 3, "method": "quantease", "iterations": 1, "group_size": 8, "outliers": 0.15}
VARIANTS = {
    "quantize-weights, columns": QuantizeWeights(**_FEW, outlier_kind="structured"),  # type: ignore[arg-type]
    "quantize-weights, entries": QuantizeWeights(**_FEW, outlier_kind="unstructured"),  # type: ignore[arg-type]
}

PASSES = {kind.name: kind(**REQUIRED.get(kind.name, {})) for kind in ALL_PASSES} | VARIANTS


@functools.cache
def given(name: str, model: str) -> Program:
    """Return what the pass is given in a pipeline."""
    return program(model) if name == "canonicalize" else canonical(model)


@functools.cache
def result(name: str, model: str) -> PassResult | PassError:
    """Return what a pass makes of a model, or why it refuses."""
    try:
        return PASSES[name](given(name, model), context())
    except PassError as error:
        return error.with_traceback(None)


def changed(name: str, model: str) -> Program | None:
    """Return the changed program; None where the pass left it alone or refused."""
    found = result(name, model)
    return found.program if isinstance(found, PassResult) and found.modified else None


every_model = pytest.mark.parametrize("model", MODELS)
every_pass = pytest.mark.parametrize("name", PASSES)


def inputs_of(before: Program, after: Program) -> list[tuple[str, Inputs]]:
    """Return inputs with and without a cache and padding; for both, unless signatures differ."""
    found = []
    source = before if before.signatures == after.signatures else after
    for graph, signature in after.signatures.items():
        for sizes in ({"sequence": 9, "past": 0}, {"sequence": 5, "past": 3, "pads": 2}):
            inputs = feed(source, graph, **sizes)
            dtypes = {
                str(node.target): node.meta["val"].dtype
                for node in after.graphs[graph].find_nodes(op="placeholder")
            }
            found.append((graph, {n: inputs[n].to(dtypes[n]) for n in signature.inputs}))
    return found


@every_model
@every_pass
def test_outputs_are_as_close_as_declared(name: str, model: str) -> None:
    before, after = given(name, model), changed(name, model)
    if after is None:
        return
    for graph, inputs in inputs_of(before, after):
        found = after.run(inputs, graph)
        if PASSES[name].fidelity is Fidelity.LOSSY:
            for output, value in found.items():
                assert value.isfinite().all(), output
            continue
        expected = before.run(inputs, graph)
        if PASSES[name].fidelity is Fidelity.BITWISE:
            assert_same_bits(found, expected)
            continue
        wide = [each.run(inputs, graph, dtype=torch.float64) for each in (after, before)]
        found, expected, *wide = (
            dict(PASSES[name].kept(inputs, one)) for one in (found, expected, *wide)
        )
        if not expected:
            continue
        assert worst_error(*wide) <= EXACT
        dtype = next(iter(expected.values())).dtype
        assert worst_error(found, expected) <= rounding(dtype, steps=256)


@every_model
@every_pass
def test_a_cache_and_padding_still_change_nothing(name: str, model: str) -> None:
    if after := changed(name, model):
        judge_consistency(given(name, model), after, name)


@every_model
@every_pass
def test_the_input_program_is_left_alone(name: str, model: str) -> None:
    fresh = given(name, model).editable()
    before = to_text(given(name, model)), fingerprint(given(name, model))
    result(name, model)
    assert (to_text(given(name, model)), fingerprint(given(name, model))) == before
    assert fingerprint(fresh) == before[1]
    verify(given(name, model))


@every_model
@every_pass
def test_a_second_run_changes_nothing(name: str, model: str) -> None:
    once = changed(name, model)
    if once is None or name in RUNS_AGAIN:
        return
    twice = PASSES[name](once, context())
    assert not twice.modified
    assert fingerprint(twice.program) == fingerprint(once)


@every_model
@every_pass
def test_a_refusal_says_what_to_do(name: str, model: str) -> None:
    found = result(name, model)
    if isinstance(found, PassError):
        assert str(found)
        assert found.remedy


@every_model
@every_pass
def test_remarks_name_something_and_say_something(name: str, model: str) -> None:
    found = result(name, model)
    if isinstance(found, PassResult):
        for remark in found.remarks:
            assert remark.where
            assert remark.message
            assert "\n" not in str(remark)


@every_model
@every_pass
def test_the_result_saves_and_loads_bitwise(name: str, model: str, tmp_path: Path) -> None:
    after = changed(name, model)
    if after is None:
        return
    save_program(after, tmp_path)
    again = load_program(tmp_path)
    assert fingerprint(again) == fingerprint(after)
    for graph, inputs in inputs_of(given(name, model), after):
        assert_same_bits(again.run(inputs, graph), after.run(inputs, graph))


@every_pass
def test_the_text_form_round_trips(name: str) -> None:
    pass_ = PASSES[name]
    assert parse(to_spec(pass_), all_passes(), base=Pass) == (pass_,)
    assert Pipeline.parse(str(Pipeline([pass_]))).passes == (pass_,)


@every_pass
def test_it_is_documented(name: str) -> None:
    kind = type(PASSES[name])
    assert {"__doc__", "name", "fidelity"} <= vars(kind).keys()
    assert undocumented(kind) == ()
    assert "Source:" in (kind.__doc__ or "")
    assert describe(kind).summary.endswith(".")


@every_pass
def test_it_applies_to_some_model(name: str) -> None:
    """Without such a model the other tests of this file would check a pass that did nothing."""
    found = [result(name, model) for model in MODELS]
    assert any(isinstance(each, PassResult) and each.modified for each in found)


def test_tables_name_passes_that_exist() -> None:
    assert set(REQUIRED) | set(RUNS_AGAIN) <= set(PASSES)
    assert issubclass(PassError, ModelatheError)
