"""The program that healing gives back is the one that it trained and judged."""

from __future__ import annotations

from typing import Any

import pytest

from modelathe.ir import Program
from modelathe.passes import Heal, PassResult
from modelathe.passes.outputs import predictions, runner, token_batch
from modelathe.passes.training.trainer import distance
from support.training import SHORT, context, pruned


def heal(before: Program, **options: Any) -> PassResult:
    return Heal(**{**SHORT, "patience": 0, **options})(before, context())


def judged(result: PassResult) -> float:
    """Return the loss of the weights that were kept."""
    curve = result.details["curve"]
    return min(point["text"] for point in curve if point.get("turned", 1.0) == 1.0)


def measured(result: PassResult, before: Program) -> float:
    """Return the loss of the program that came out, on the windows that judged it."""
    windows = Heal(**SHORT)._batches(before, context()).held_out["text"]
    original = context().reference(before)
    expected, found = (
        predictions(program, token_batch(program, windows), runner(program))
        for program in (original, result.program)
    )
    return float(distance(original.kind, expected, found).mean())


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
