"""Scales that a norm's gain divides by and its readers multiply with: no fold undoes them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import fx

from modelathe.ir import Linear, Norm, Program, marks_of
from modelathe.passes import (
    CenterResidual,
    Equalize,
    FoldNorms,
    FoldRepBatchNorms,
    Heal,
    PassResult,
    RemoveNorms,
    ReplaceNorms,
)
from modelathe.passes.fidelity import judge_rounding
from modelathe.passes.norms.gains import EQUALIZED, KEPT
from support.models import canonical
from support.training import SHORT, context


@functools.cache
def equalized(name: str) -> Program:
    folded = FoldNorms(untie=True)(canonical(name), context()).program
    return Equalize(kind="smooth", grid=4)(folded, context()).program


def marked(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if EQUALIZED in marks_of(node)]


def readers(program: Program, nodes: list[fx.Node]) -> list[str]:
    """Return the weights of the linears that read these."""
    linears = (Linear.match(user) for node in nodes for user in node.users)
    return [str(linear.weight.target) for linear in linears if linear is not None]


def weights(program: Program) -> set[str]:
    """Return the weights of all linears."""
    linears = filter(None, map(Linear.match, program.graph.nodes))
    return {str(linear.weight.target) for linear in linears}


def undone(program: Program) -> list[str]:
    """Return the scaled weights that something was folded into afterwards."""
    later = {name: name.partition(".equalized.")[2] for name in weights(program)}
    return [name for name, verbs in later.items() if "folded" in verbs or "frozen" in verbs]


def said(result: PassResult) -> list[str]:
    return [r.where for r in result.remarks if r.kind == "missed" and KEPT in r.message]


def test_centring_the_stream_keeps_them_from_being_folded() -> None:
    before = equalized("gpt2")
    centred = CenterResidual(untie=True)(before, context()).program
    kinds = [norm.kind for node in marked(centred) if (norm := Norm.match(node))]
    assert kinds == ["rms"] * len(marked(before)) != []
    result = FoldNorms(untie=True)(centred, context())
    assert said(result) == [node.name for node in marked(centred)]
    assert set(readers(centred, marked(centred))) <= weights(result.program)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("options", [{}, {"end_of_text": True}])
def test_removing_norms_does_not_fold_them(name: str, options: dict[str, Any]) -> None:
    before = equalized(name)
    result = RemoveNorms(untie=True, **options)(before, context())
    assert result.modified
    assert {node.name for node in marked(before)} <= set(said(result))
    assert not undone(result.program)


def test_freezing_norms_while_healing_does_not_fold_them() -> None:
    waiting = RemoveNorms(untie=True, schedule="progressive")(equalized("llama"), context()).program
    result = Heal(**SHORT)(waiting, context())
    assert not any(map(Norm.match, result.program.graph.nodes))
    assert not undone(result.program)


def test_a_rep_batch_norm_in_their_place_is_not_folded_behind_it() -> None:
    before = equalized("gpt2")
    replaced = ReplaceNorms()(before, context()).program
    assert len(marked(replaced)) == len(marked(before))
    result = FoldRepBatchNorms(untie=True)(replaced, context())
    assert len(said(result)) == len(marked(before))
    assert set(readers(before, marked(before))) <= weights(result.program)
    judge_rounding(replaced, result.program, "fold-rep-batch-norms")
