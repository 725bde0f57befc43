"""Moments of the inputs and results of norms, over all of the calibration text."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from modelathe.ir import MAIN, ComputedWeight, Embedding, Linear, Norm, Program, insert_call
from modelathe.passes import outputs
from modelathe.passes.analysis.channel_moments import ChannelMoments, norm_moments
from support.models import canonical, context, module


def test_parts_of_a_sample_merge_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    # a mean that is large against the spread: plain sums of squares would cancel
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64) + 1e6
    y = x * torch.tensor([1.0, -2, 0]) + torch.randn(60, 3, generator=generator)
    merged = ChannelMoments.of(x[:7], y[:7])
    for start, end in ((7, 8), (8, 40), (40, 60)):
        merged = merged.merged(ChannelMoments.of(x[start:end], y[start:end]))
    assert merged.count == 60
    torch.testing.assert_close(merged.mean, x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.output_mean, y.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.variance, x.var(0, correction=0), rtol=1e-9, atol=0)
    for channel in range(3):
        pair = torch.stack([x[:, channel], y[:, channel]])
        covariance = torch.cov(pair, correction=0)[0, 1]
        torch.testing.assert_close(merged.covariance[channel], covariance, rtol=1e-8, atol=1e-8)


def first_norm(program: Program, graph: str = MAIN) -> fx.Node:
    return next(node for node in program.graphs[graph].nodes if Norm.match(node))


def test_a_norm_is_measured_on_every_token() -> None:
    program, tokens = (
        canonical("token-norm"),
        context().calibration_tokens(canonical("bert")).tokens,
    )
    found = norm_moments(program, program, MAIN, first_norm(program), tokens, "cpu")
    model = module("token-norm")
    with torch.no_grad():
        x = model.embed(tokens)
        expected = ChannelMoments.of(x, model.norm(x))
    assert found.count == expected.count == 48
    for name in ("mean", "variance", "output_mean", "covariance"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_long_texts_are_measured_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    program = canonical("token-norm")
    tokens = torch.randint(48, (7, 5), generator=torch.Generator().manual_seed(4))
    whole = norm_moments(program, program, MAIN, first_norm(program), tokens, "cpu")
    monkeypatch.setattr(outputs, "BATCH_TOKENS", 10)
    parts = norm_moments(program, program, MAIN, first_norm(program), tokens, "cpu")
    assert parts.count == whole.count == 35
    torch.testing.assert_close(parts.covariance, whole.covariance)


def test_inputs_are_the_programs_and_results_the_references() -> None:
    reference = canonical("token-norm")
    program = reference.editable()
    embedding = next(node for node in program.graph.nodes if Embedding.match(node))
    doubled = insert_call(
        program.graph,
        torch.ops.aten.mul.Tensor,
        (embedding, 2),
        before=embedding.next,
        like=embedding,
    )
    embedding.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    tokens = torch.arange(20).reshape(2, 10)
    same = norm_moments(reference, reference, MAIN, first_norm(reference), tokens, "cpu")
    found = norm_moments(program, reference, MAIN, first_norm(program), tokens, "cpu")
    torch.testing.assert_close(found.mean, 2 * same.mean)
    torch.testing.assert_close(found.output_mean, same.output_mean)


@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_both_graphs_of_an_encoder_decoder_are_measured(graph: str) -> None:
    program = canonical("t5")
    tokens = torch.arange(12).reshape(2, 6)
    found = norm_moments(program, program, graph, first_norm(program, graph), tokens, "cpu")
    assert found.count == 12


def test_nothing_behind_the_norm_is_computed() -> None:
    program = canonical("token-norm").editable()
    head = next(linear for node in program.graph.nodes if (linear := Linear.match(node)))
    shape = program.weight(head.weight).shape

    def fail() -> torch.Tensor:
        raise AssertionError("the head is not needed")

    name = program.add_weight("unread", ComputedWeight("none", (), shape, torch.float32, fail))
    head.set_weights(program.weight_node(program.graph, name, before=head.node), head.bias)
    tokens = torch.arange(12).reshape(2, 6)
    assert norm_moments(program, program, MAIN, first_norm(program), tokens, "cpu").count == 12
