"""What a pass says that it keeps is what it is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from modelathe.ir import FidelityError, Linear, Program, insert_call
from modelathe.passes import Fidelity, Pass, PassContext, PassResult, Pipeline, Remark
from support.models import canonical, context
from support.views import views


@dataclass(frozen=True, kw_only=True)
class Shift(Pass):
    """Adds a number to every logit."""

    name: ClassVar[str] = "shift"
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    by: float = 1.0

    def run(self, program: Program, context: PassContext) -> PassResult:
        head = views(Linear, program)[-1].node
        end = program.graph.output_node()
        moved = insert_call(
            program.graph, torch.ops.aten.add.Tensor, (head, self.by), before=end, like=head
        )
        end.replace_input_with(head, moved)
        return PassResult(program, (Remark("applied", head.name, "shifted"),))


@dataclass(frozen=True, kw_only=True)
class HonestShift(Shift):
    """Says that it keeps log-probabilities."""

    name: ClassVar[str] = "honest-shift"

    def kept(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        assert "input_ids" in inputs
        return {**outputs, "logits": outputs["logits"].log_softmax(-1)}


@dataclass(frozen=True, kw_only=True)
class WrongShift(HonestShift):
    """Moves a cached key, too."""

    name: ClassVar[str] = "wrong-shift"

    def run(self, program: Program, context: PassContext) -> PassResult:
        result = super().run(program, context)
        end = program.graph.output_node()
        (values,) = end.args
        assert isinstance(values, tuple)
        doubled = insert_call(
            program.graph, torch.ops.aten.mul.Tensor, (values[1], 2.0), before=end, like=end
        )
        end.args = ((values[0], doubled, *values[2:]),)
        return result


def judged(pass_: Pass) -> float | None:
    found = Pipeline([pass_], context=context())(canonical("llama"))
    return found.steps[-1].measured.error


def test_by_default_everything_is_kept() -> None:
    with pytest.raises(FidelityError, match="shift: output logits is off by"):
        judged(Shift())


def test_a_pass_may_keep_what_outputs_mean() -> None:
    error = judged(HonestShift())
    assert error is not None
    assert error <= 1e-12


def test_what_else_it_keeps_is_judged_and_the_right_call_is_blamed() -> None:
    """The shift of the logits differs too, and is not what spoils the keys."""
    with pytest.raises(FidelityError, match=r"output present.0.key is off .* at %mul\w*"):
        judged(WrongShift())
