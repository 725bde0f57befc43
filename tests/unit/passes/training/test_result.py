"""The program that healing gives back is the one that it trained and judged."""

from __future__ import annotations

from typing import Any

import pytest

from modelathe.ir import Norm, Program
from modelathe.passes import (
    CenterResidual,
    FoldNorms,
    Heal,
    Pass,
    PassResult,
    QuantizeWeights,
    RemoveNorms,
    ReplaceNorms,
    TieBlocks,
)
from modelathe.passes.outputs import predictions, runner, token_batch
from modelathe.passes.training.batches import training_batches
from modelathe.passes.training.trainer import distance
from support.listener import Listener
from support.models import canonical
from support.training import SHORT, context, pruned


def heal(before: Program, listener: Listener | None = None, **options: Any) -> PassResult:
    heard = context(progress=listener or Listener())
    return Heal(**{**SHORT, "patience": 0, **options})(before, heard)


def judged(result: PassResult) -> float:
    """Return the loss of the weights that were kept."""
    curve = result.details["curve"]
    return min(point["text"] for point in curve if point.get("turned", 1.0) == 1.0)


def measured(result: PassResult, before: Program) -> float:
    """Return the loss of the program that came out, on the windows that judged it."""
    sizes = {"tokens": SHORT["steps"] * SHORT["batch"], "batch": SHORT["batch"]}
    batches = training_batches(before, context(), **sizes, length=SHORT["length"], mix=0.0)
    windows = batches.held_out["text"]
    original = context().reference(before)
    expected, found = (
        predictions(program, token_batch(program, windows), runner(program))
        for program in (original, result.program)
    )
    return float(distance(original.kind, expected, found).mean())


def norms(program: Program) -> int:
    return sum(Norm.match(node) is not None for node in program.graph.nodes)


def after(name: str, *passes: Pass) -> Program:
    program = canonical(name)
    for pass_ in passes:
        program = pass_(program, context()).program
    return program


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_low_rank_updates_have_the_loss_that_was_judged(name: str) -> None:
    before = pruned(name)
    result = heal(before, weights="lora", lr=2e-2)
    assert measured(result, before) == pytest.approx(judged(result), rel=1e-4)


def test_a_head_that_is_tied_to_the_embedding_gets_no_low_rank_update() -> None:
    before = pruned("llama")
    result = heal(before, weights="lora")
    assert [remark.message for remark in result.remarks if remark.kind == "missed"] == [
        "%embedding reads its weight too, so it gets no low-rank update"
    ]
    table = before.weights.aliases["lm_head.weight"]
    assert f"{table}.healed" not in result.program.weights


@pytest.mark.parametrize(("untie", "live"), [(True, 0), (False, 1)])
def test_norms_that_two_passes_turn_have_the_loss_that_was_judged(untie: bool, live: int) -> None:
    both = RemoveNorms(schedule="progressive", untie=untie), ReplaceNorms(schedule="progressive")
    before = after("gpt2", TieBlocks(unique=1), *both)
    result = heal(before)
    assert norms(result.program) == live  # what a RepBN reads keeps its mean
    assert measured(result, before) == pytest.approx(judged(result), rel=1e-4)


def test_a_norm_behind_weights_that_were_quantised_stays_live() -> None:
    marked = after("gpt2", RemoveNorms(schedule="progressive"))
    before = QuantizeWeights(bits=8, group_size=8)(marked, context()).program
    listener = Listener()
    result = heal(before, listener)
    said = [remark.message for remark in result.remarks if remark.kind == "missed"]
    assert norms(result.program) == 5
    assert all(text.startswith("stays live: %quantized_linear") for text in said)
    assert len(said) == 7  # two blocks, three paths, and the end
    assert "and 6 more cannot be frozen now" in listener.notes[0]
    assert measured(result, before) == pytest.approx(judged(result), rel=1e-4)


def test_marked_norms_of_a_centred_stream_are_frozen() -> None:
    marked = RemoveNorms(schedule="progressive", untie=True)
    before = after("gpt2", marked, FoldNorms(untie=True), CenterResidual(untie=True))
    result = heal(before)
    assert norms(before) > norms(result.program) == 0
    assert measured(result, before) == pytest.approx(judged(result), rel=1e-4)
