"""Metrics against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from modelathe.passes.metrics import (
    CosineTally,
    TokenMetrics,
    TokenTally,
    cosine_rows,
    kl_rows,
    log_probabilities,
    mean_pool,
)

LOGITS = torch.randn(3, 50, 7, generator=torch.Generator().manual_seed(0))
REFERENCE = torch.randn(3, 50, 7, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(7, (3, 50), generator=torch.Generator().manual_seed(2))


def figures(logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> TokenMetrics:
    """Return the figures of one text: ``logits [..., vocab]`` predict ``targets [...]``."""
    tally = TokenTally()
    flat = None if reference is None else reference.flatten(0, -2)
    tally.add(logits.flatten(0, -2), targets.flatten(), flat)
    return tally.metrics()


def divergence(reference: list[float], logits: list[float]) -> float:
    rows = (log_probabilities(torch.tensor([row])) for row in (reference, logits))
    return float(kl_rows(*rows))


def test_token_metrics_are_those_of_the_definition() -> None:
    found = figures(LOGITS, TARGETS, REFERENCE)
    q, p = LOGITS.double().log_softmax(-1), REFERENCE.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert found.tokens == 150
    assert found.perplexity == pytest.approx(
        float(torch.nn.functional.nll_loss(q.flatten(0, 1), TARGETS.flatten()).exp())
    )
    assert found.reference_perplexity == pytest.approx(
        float(torch.nn.functional.nll_loss(p.flatten(0, 1), TARGETS.flatten()).exp())
    )
    assert found.kl == pytest.approx(float(kl))
    assert found.top1_agreement == pytest.approx(
        float((q.argmax(-1) == p.argmax(-1)).double().mean())
    )


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = figures(LOGITS, TARGETS, REFERENCE)
    monkeypatch.setattr("modelathe.passes.metrics._SLICE_ELEMENTS", 15)
    sliced = figures(LOGITS, TARGETS, REFERENCE)
    assert sliced.kl == pytest.approx(whole.kl, rel=1e-12)
    assert sliced.perplexity == pytest.approx(whole.perplexity, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_logits_have_no_divergence_at_all(dtype: torch.dtype) -> None:
    found = figures(LOGITS.to(dtype), TARGETS, LOGITS.to(dtype))
    assert (found.kl, found.top1_agreement) == (0.0, 1.0)


def test_masked_logits_add_nothing_and_a_lost_token_is_infinite() -> None:
    plain, masked = [0.0, 1.0, 2.0], [0.0, 1.0, -math.inf]
    expected = math.log1p(math.exp(2) / (1 + math.e))
    assert divergence(masked, plain) == pytest.approx(expected)
    assert divergence(masked, masked) == 0.0
    assert divergence(plain, masked) == math.inf


def test_nan_is_not_hidden() -> None:
    found = figures(torch.tensor([[math.nan, 0.0]]), torch.tensor([1]))
    assert math.isnan(found.perplexity)


def test_a_tally_wants_a_reference_always_or_never() -> None:
    tally = TokenTally()
    with pytest.raises(ValueError, match="no token"):
        tally.metrics()
    tally.add(LOGITS[0], TARGETS[0], REFERENCE[0])
    tally.add(LOGITS[1], TARGETS[1])
    with pytest.raises(ValueError, match="50 of 100"):
        tally.metrics()


def test_cosine_of_zero_rows() -> None:
    rows = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    reference = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 3.0], [-1.0, 0.0]])
    assert cosine_rows(rows, reference).tolist() == pytest.approx([1.0, 0.0, 1.0, -1.0])


def test_cosine_tally_has_mean_and_minimum() -> None:
    tally = CosineTally()
    with pytest.raises(ValueError, match="no row"):
        tally.metrics()
    tally.add(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert (tally.metrics().count, tally.metrics().cosine, tally.metrics().cosine_min) == (
        2,
        0.5,
        0,
    )


def test_mean_pool_leaves_padding_out() -> None:
    hidden = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert mean_pool(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0]]
    assert mean_pool(hidden, torch.tensor([[0, 0, 0]])).tolist() == [[0.0]]
