"""A run of an exact pass, with what it promises checked."""

from __future__ import annotations

from modelathe.ir import Program
from modelathe.passes import Pass, PassResult
from modelathe.passes.consistency import judge_consistency
from modelathe.passes.fidelity import judge_rounding
from support.numeric import EXACT


def checked(before: Program, pass_: Pass) -> PassResult:
    """Run a pass, check that it is exact, and that a second run does nothing more."""
    result = pass_(before)
    if result.modified:
        assert judge_rounding(before, result.program, "here", pass_.kept).error <= EXACT
        judge_consistency(before, result.program, "here")
        assert not pass_(result.program).modified
    return result
