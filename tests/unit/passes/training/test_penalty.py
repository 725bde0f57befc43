"""The term for removed norms: its value, its gradient, and that healing has it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from modelathe.ir import PassError, find_blocks
from modelathe.passes import Heal, Pass, Pipeline, RemoveNorms
from modelathe.passes.training.penalty import deviation_penalty
from support.models import canonical
from support.training import SHORT, context


@pytest.mark.parametrize("end", [7, [9, 7]])
def test_it_is_the_spread_of_deviations_around_that_of_plain_tokens(end: Any) -> None:
    program = canonical("gpt2")
    program = replace(program, config={**program.config, "eos_token_id": end})
    place = find_blocks(program.graph)[-1].output
    assert place is not None
    tokens = torch.tensor([[1, 7, 3, 4], [7, 2, 5, 6]])
    stream = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0)).double()
    stream.requires_grad_()
    begin = deviation_penalty(program, program, 0.5)
    assert begin is not None
    observe, penalty = begin(tokens)
    observe(place, stream)
    found = penalty()
    deviations = [[row.var(correction=0).add(1e-5).sqrt() for row in rows] for rows in stream]
    plain = [deviations[0][2], deviations[0][3], *deviations[1][1:]]  # neither first nor 7
    mean = torch.stack(plain).mean().detach()
    expected = 0.5 * torch.stack([(d - mean) ** 2 for row in deviations for d in row]).mean()
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, stream)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_healing_has_it_after_norms_were_removed_only() -> None:
    def healed(*before: Pass, **options: Any) -> list[Any]:
        passes = [*before, Heal(**{**SHORT, "steps": 2, **options})]
        done = Pipeline(passes, context=context(), check=False)(canonical("gpt2"))
        return list(done.steps[-1].details["curve"])

    removed = RemoveNorms(untie=True)
    usual, without = healed(removed), healed(removed, auxiliary=0.0)
    assert usual == healed(removed, auxiliary=0.1)
    assert usual != without
    assert healed() == healed(auxiliary=0.0)


def test_healing_has_it_not_where_no_norm_could_be_removed() -> None:
    without = RemoveNorms(target_kl=1e-12)
    passes = [without, Heal(**{**SHORT, "steps": 1}, auxiliary=0.3)]
    with pytest.raises(PassError, match="for norms that were removed, and none was"):
        Pipeline(passes, context=context(), check=False)(canonical("gpt2"))


def test_healing_has_it_for_norms_that_wait_for_it() -> None:
    passes = [RemoveNorms(schedule="progressive"), Heal(**{**SHORT, "steps": 1}, auxiliary=0.3)]
    Pipeline(passes, context=context(), check=False)(canonical("gpt2"))


@pytest.mark.parametrize("name", ["norm-mlp", "conv-norms"])
def test_a_model_without_blocks_has_none(name: str) -> None:
    program = canonical(name)
    assert deviation_penalty(program, program, 1.0) is None
