"""What switches learn is trained at the rate of full weights, whatever else is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modelathe.passes import Heal, QuantizeWeights, ReplaceNorms
from modelathe.passes.training import heal
from support.models import canonical
from support.training import SHORT, context


def rates(patch: pytest.MonkeyPatch, **options: Any) -> list[tuple[str, float]]:
    """Return the peak rate of everything that a healing of RepBN trains, by name."""
    made: list[tuple[str, float]] = []
    usual = heal.make_optimizer

    def make(kind: str, parameters: Any, shares: Any, rate: float, *rest: Any) -> Any:
        made.extend((name, rate * shares.get(name, 1.0)) for name in parameters)
        optimizer: torch.optim.Optimizer = usual(kind, parameters, shares, rate, *rest)
        return optimizer

    patch.setattr(heal, "make_optimizer", make)
    program = canonical("gpt2")
    if options["weights"] == "scales":
        program = QuantizeWeights(bits=8, group_size=-1)(program, context()).program
    marked = ReplaceNorms(schedule="progressive")(program, context()).program
    Heal(**{**SHORT, "lr": None, "steps": 1, **options})(marked, context())
    return made


@pytest.mark.parametrize(("weights", "factor"), [("full", 1), ("lora", 10), ("scales", 0.05)])
def test_switches_learn_at_the_rate_of_full_weights(
    monkeypatch: pytest.MonkeyPatch, weights: str, factor: float
) -> None:
    found = rates(monkeypatch, weights=weights)
    switches = {rate for name, rate in found if name.startswith("switch.")}
    others = {rate for name, rate in found if not name.startswith("switch.")}
    assert [pytest.approx(6e-4)] == list(switches)
    assert [pytest.approx(factor * 6e-4)] == list(others)


def test_layer_decay_rules_switches_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rates(monkeypatch, weights="norms", layer_decay=0.5)
    gains = [rate for name, rate in found if name.startswith("switch.") and name.endswith("gain")]
    # two norms in each of two blocks, and the last one
    assert gains == pytest.approx([3e-4, 3e-4, 6e-4, 6e-4, 6e-4])


def test_full_weights_train_scales_at_a_twentieth_and_undecayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[bool, set[tuple[float, float]]] = {True: set(), False: set()}
    usual = heal.make_optimizer

    def make(kind: str, parameters: Any, *rest: Any) -> Any:
        optimizer = usual(kind, parameters, *rest)
        for group in optimizer.param_groups:
            for name, parameter in parameters.items():
                if parameter.dim() > 1 and any(parameter is one for one in group["params"]):
                    found["scales" in name].add((group["share"], group["weight_decay"]))
        return optimizer

    monkeypatch.setattr(heal, "make_optimizer", make)
    quantized = QuantizeWeights(bits=4, group_size=8)(canonical("gpt2"), context()).program
    Heal(**{**SHORT, "steps": 1, "weight_decay": 0.1})(quantized, context())
    assert found == {True: {(0.05, 0.0)}, False: {(1.0, 0.1)}}
