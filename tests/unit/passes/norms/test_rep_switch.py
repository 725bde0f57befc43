"""The switch that turns a norm into RepBN: what it computes, and how far it is turned."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from modelathe.ir import Norm, Program
from modelathe.passes.analysis.channel_moments import norm_moments
from modelathe.passes.norms.rep_batch_norm import EPS, RepParameters
from modelathe.passes.norms.rep_switch import RepSwitch, share_at
from support.models import canonical
from support.numeric import relative_error
from support.rep_switches import PASS, switches
from support.training import text
from support.views import views


def switch_of(model: str, share: float) -> tuple[RepSwitch, fx.Node]:
    """Return the switch of the first norm of a model, made uneven, and the norm."""
    node, switch = next(iter(switches(canonical(model)).items()))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in (switch.gain, switch.bias, switch.multiple, switch.mean):
            value.add_(torch.randn(value.shape, generator=generator))
        switch.variance.mul_(torch.rand(switch.variance.shape, generator=generator) + 0.5)
        switch.share.fill_(share)
    return switch.eval(), node


def arguments(program: Program, norm: Norm) -> tuple[Any, ...]:
    """Return what a norm is called with behind its input, weights loaded."""
    return fx.node.map_arg(norm.node.args[1:], lambda node: program.weight(node).load())  # type: ignore[no-any-return]


def values() -> Tensor:
    return 3 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(5)) + 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_switch_that_was_not_turned_is_the_norm(model: str, training: bool) -> None:
    switch, node = switch_of(model, 1.0)
    norm = Norm.match(node)
    assert norm is not None
    rest = arguments(canonical(model), norm)
    found = switch.train(training)(values(), *rest)
    assert torch.equal(found, node.target(values(), *rest))  # type: ignore[operator]
    assert switch.turned == 0.0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_turned_switch_is_the_rep_batch_norm(model: str, training: bool) -> None:
    switch, node = switch_of(model, 0.0)
    norm = Norm.match(node)
    assert norm is not None
    plain, held = nn.BatchNorm1d(32, EPS).eval(), switch.rep
    state = {"weight": held.gain, "bias": held.bias, "running_mean": held.mean}
    plain.load_state_dict({**state, "running_var": held.variance}, strict=False)
    x = values()
    expected = plain(x.flatten(0, 1)).view_as(x) + held.alpha * x
    found = switch.train(training)(x, *arguments(canonical(model), norm))
    assert torch.equal(found, expected)
    assert switch.turned == 1.0


def test_in_between_it_is_both_by_their_shares() -> None:
    switch, node = switch_of("gpt2", 0.25)
    norm = Norm.match(node)
    assert norm is not None
    rest, found = arguments(canonical("gpt2"), norm), []
    for share in (1.0, 0.25, 0.0):
        switch.share.fill_(share)
        found.append(switch(values(), *rest))
    torch.testing.assert_close(found[1], 0.25 * found[0] + 0.75 * found[2])


def test_training_normalises_with_the_batch_and_keeps_running_statistics() -> None:
    switch, node = switch_of("gpt2", 0.5)
    norm = Norm.match(node)
    assert norm is not None
    rest, x = arguments(canonical("gpt2"), norm), values()
    mean, variance = switch.mean.clone(), switch.variance.clone()
    judged = switch(x, *rest)
    assert torch.equal(switch.mean, mean)
    trained = switch.train()(x, *rest)
    assert not torch.allclose(trained, judged)
    rows = x.flatten(0, 1)
    torch.testing.assert_close(switch.mean, 0.9 * mean + 0.1 * rows.mean(0))
    torch.testing.assert_close(switch.variance, 0.9 * variance + 0.1 * rows.var(0))


def test_statistics_are_fixed_once_it_is_turned() -> None:
    switch, node = switch_of("gpt2", 0.0)
    norm = Norm.match(node)
    assert norm is not None
    mean = switch.mean.clone()
    switch.train()(values(), *arguments(canonical("gpt2"), norm))
    assert torch.equal(switch.mean, mean)


def test_one_vector_alone_has_no_statistics_to_train_with() -> None:
    switch, node = switch_of("gpt2", 0.5)
    norm = Norm.match(node)
    assert norm is not None
    one, rest = values()[:1, :1], arguments(canonical("gpt2"), norm)
    judged = switch(one, *rest)
    assert torch.equal(switch.train()(one, *rest), judged)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_it_starts_from_the_line_of_least_squares_of_every_norm(name: str) -> None:
    program, windows = canonical(name), text().tokens
    graphs = {graph: name for name, graph in program.graphs.items()}
    made = switches(program)
    assert len(made) == len(views(Norm, program))
    for node, switch in made.items():
        moments = norm_moments(program, program, graphs[node.graph], node, windows, "cpu")
        wanted, held = RepParameters.fitted(moments), switch.rep
        for part in ("gain", "bias", "mean", "variance", "alpha"):
            assert relative_error(getattr(wanted, part), getattr(held, part)) <= 1e-6


def test_a_step_on_alpha_moves_results_as_much_however_large_the_values_are() -> None:
    node, switch = next(iter(switches(canonical("gpt2")).items()))
    norm = Norm.match(node)
    assert norm is not None
    start = switch.rep
    moved = []
    for size in (1.0, 100.0):
        large = dataclasses.replace(start, variance=start.variance * size**2)
        switch = RepSwitch(norm, large)
        before = float(switch.rep.alpha)
        with torch.no_grad():
            switch.multiple.add_(1.0)
        moved.append((float(switch.rep.alpha) - before) * float(large.variance.max().sqrt()))
    assert moved == pytest.approx([1.0, 1.0], rel=1e-2)


@pytest.mark.parametrize(
    ("step", "steps", "share"),
    [(0, 100, 1.0), (20, 100, 0.5), (39, 100, 0.025), (40, 100, 0.0), (99, 100, 0.0), (0, 1, 1.0)],
)
def test_the_share_falls_to_nothing_in_two_fifths_of_a_run(
    step: int, steps: int, share: float
) -> None:
    assert share_at(step, steps) == pytest.approx(share)
    made = switches(canonical("gpt2"))
    PASS.turn(made, step, steps, 0.0)
    assert [float(switch.share) for switch in made.values()] == pytest.approx([share] * len(made))
