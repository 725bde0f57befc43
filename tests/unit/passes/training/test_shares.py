"""Rates where nothing normalises."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor

from modelathe.ir import Program, capture
from modelathe.passes import Canonicalize, Heal, Pass, RemoveNorms, ReplaceNorms
from modelathe.passes.probes import empty_cache, feeds
from modelathe.passes.training.shares import size_shares
from support.models import canonical, module
from support.training import SHORT, context, text

LARGE = 1000.0
WRITERS = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")


@functools.cache
def with_a_large_stream() -> Program:
    """Return a llama that computes what another does, on a residual stream times ``LARGE``."""
    model = copy.deepcopy(module("llama-bf16")).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(WRITERS):
                parameter.mul_(LARGE)
    return Canonicalize()(capture(model)).program


@pytest.mark.parametrize("pass_", [ReplaceNorms(), RemoveNorms()], ids=lambda pass_: pass_.name)
def test_no_step_ruins_a_model_whose_large_residual_stream_lost_its_norms(pass_: Pass) -> None:
    damaged = pass_(with_a_large_stream(), context()).program
    losses = [point["text"] for point in Heal(**SHORT)(damaged, context()).details["curve"]]
    assert min(losses) < losses[0]
    assert max(losses) < 2 * losses[0]


def test_a_share_is_the_inverse_of_what_a_weight_multiplies() -> None:
    damaged = ReplaceNorms()(with_a_large_stream(), context()).program
    values: dict[str, Tensor] = {}
    windows = text().tokens
    found = size_shares(damaged, windows)
    damaged.run(
        feeds(damaged, windows, empty_cache(damaged, len(windows)), 0),
        observe=lambda node, value: values.update({node.name: value}),
    )
    alphas = [node for node in damaged.graph.find_nodes(op="get_attr") if "alpha" in node.name]
    assert len(alphas) == 5
    for alpha in alphas:
        (product,) = alpha.users
        read = next(node for node in product.all_input_nodes if node is not alpha)
        median = float(values[read.name].abs().median())
        assert median > LARGE / 10
        assert found[str(alpha.target)] == pytest.approx(1 / median)


def test_behind_norms_nothing_is_held_back() -> None:
    before = canonical("llama")
    found = size_shares(before, text().tokens)
    projections = {name for name in before.weights if "proj" in name}
    assert {name for name in found if "proj" in name} == projections
    assert set(found.values()) == {1.0}
