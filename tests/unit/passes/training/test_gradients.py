"""What cannot be trained is refused at the first step; runs are no longer than was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modelathe.ir import Linear, PassError, Program, insert_call
from modelathe.passes import Heal
from modelathe.passes.training.trainer import distance
from support.training import SHORT, context, pruned

TOKENS = {name: value for name, value in SHORT.items() if name != "steps"}


def opaque() -> Program:
    """Return a model whose head reads what an operator without a gradient gives."""
    program = pruned("llama").editable()
    head = [node for node in program.graph.nodes if Linear.match(node)][-1]
    (source, *_) = head.all_input_nodes
    call = torch.ops.aten.detach.default
    head.replace_input_with(
        source, insert_call(program.graph, call, (source,), before=head, like=source)
    )
    return program


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_an_operator_without_a_gradient_is_refused(weights: Any) -> None:
    with pytest.raises(PassError, match="no gradient reaches %"):
        Heal(**SHORT, weights=weights)(opaque(), context())


def test_what_predictions_do_not_depend_on_needs_no_gradient() -> None:
    before = pruned("bert")
    assert any("pooler" in name for name in before.weights)
    Heal(**{**SHORT, "steps": 1})(before, context())


def test_a_batch_is_no_larger_than_all_that_is_to_be_trained_on() -> None:
    result = Heal(**TOKENS, tokens=16)(pruned("llama"), context())
    assert result.details["curve"][-1]["tokens"] == 16


def test_less_than_one_window_is_refused() -> None:
    with pytest.raises(PassError, match="tokens=7 are less than one window of 8"):
        Heal(**TOKENS, tokens=7)(pruned("llama"), context())


@pytest.mark.parametrize("last", [-torch.inf, 0.0])
def test_tokens_that_the_teacher_masks_leave_loss_and_gradient_finite(last: float) -> None:
    expected = torch.tensor([[[0.0, 1.0, -torch.inf], [2.0, 0.5, 1.0]]])
    found = torch.tensor([[[0.5, 0.2, last], [1.0, 1.0, 0.0]]], requires_grad=True)
    loss = distance("decoder", expected, found)
    loss.sum().backward()
    assert loss.shape == (1, 2)
    assert bool(loss.isfinite().all())
    assert found.grad is not None
    torch.testing.assert_close(found.grad, found.detach().softmax(-1) - expected.softmax(-1))
