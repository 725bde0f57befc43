"""Typed views find their calls, whether arguments are given by position or by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from modelathe.ir import (
    Attention,
    BatchNorm,
    Convolution,
    Embedding,
    Linear,
    Norm,
    Program,
    QuantizedEmbedding,
    QuantizedLinear,
    Rotary,
    capture,
    is_weight,
    verify,
)
from modelathe.passes import QuantizeWeights
from support.feeds import feed
from support.models import canonical, program

VIEWS = (
    Attention,
    BatchNorm,
    Convolution,
    Embedding,
    Linear,
    Norm,
    QuantizedEmbedding,
    QuantizedLinear,
    Rotary,
)
aten = torch.ops.aten


def views(found: Program) -> list[str]:
    """Return the kind of view of each call that has one."""
    return [
        kind.__name__
        for node in found.graph.nodes
        for kind in VIEWS
        if kind.match(node) is not None
    ]


def test_each_call_has_one_view_at_most() -> None:
    assert views(program("tied-head")) == ["Embedding", "Norm", "Linear"]
    quantized = QuantizeWeights(group_size=8)(program("tied-head")).program
    assert views(quantized) == ["QuantizedEmbedding", "Norm", "QuantizedLinear"]
    assert views(canonical("llama")).count("Attention") == 2
    assert views(canonical("llama")).count("Rotary") == 4
    folds = ["Convolution", "BatchNorm"] * 2
    assert views(program("conv-norms")) == [*folds, "BatchNorm", "Linear"]


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear(bias: bool) -> None:
    found = capture(nn.Linear(3, 2, bias=bias).eval(), (torch.ones(4, 3),))
    (view,) = (view for node in found.graph.nodes if (view := Linear.match(node)))
    assert view.input.op == "placeholder"
    assert view.weight.target == "weight"
    assert (view.bias is not None) == bias
    assert is_weight(view.weight)
    assert not is_weight(view.input)
    assert not is_weight(None)


def test_a_rotary_embedding() -> None:
    copy = canonical("llama").editable()
    node = next(node for node in copy.graph.nodes if Rotary.match(node))
    view = Rotary.match(node)
    assert view is not None
    assert (view.input, view.cos, view.sin, view.interleaved) == node.args
    assert view.turned == view.input.meta["val"].shape[-1] == 8
    node.args, node.kwargs = node.args[:2], {"sin": view.sin, "interleaved": view.interleaved}
    assert Rotary.match(node) == view


def test_arguments_by_name_are_found_too() -> None:
    copy = program("norm-mlp").editable()
    node = next(node for node in copy.graph.nodes if Linear.match(node))
    source, weight, bias = node.args
    node.args, node.kwargs = (source,), {"weight": weight, "bias": bias}
    view = Linear.match(node)
    assert view is not None
    assert (view.input, view.weight, view.bias) == (source, weight, bias)
    verify(copy)


def test_a_linear_can_read_other_weights() -> None:
    copy = program("norm-mlp").editable()
    view = next(view for node in copy.graph.nodes if (view := Linear.match(node)))
    assert view.bias is not None
    view.set_weights(view.weight, None)
    verify(copy)
    again = Linear.match(view.node)
    assert again is not None
    assert (again.weight, again.bias) == (view.weight, None)


@pytest.mark.parametrize(
    ("norm", "kind", "gain", "bias", "eps"),
    [
        (nn.LayerNorm(4), "layer", True, True, 1e-5),
        (nn.LayerNorm(4, eps=1e-3, bias=False), "layer", True, False, 1e-3),
        (nn.LayerNorm(4, elementwise_affine=False), "layer", False, False, 1e-5),
        (nn.RMSNorm(4, eps=1e-6), "rms", True, False, 1e-6),
        (nn.RMSNorm(4), "rms", True, False, None),
    ],
)
def test_a_norm(norm: nn.Module, kind: str, gain: bool, bias: bool, eps: float | None) -> None:
    found = capture(norm.eval(), (torch.ones(2, 4),))
    matched = [view for node in found.graph.nodes if (view := Norm.match(node))]
    (view,) = matched
    assert (view.kind, view.sizes, view.eps) == (kind, (4,), eps)
    assert (view.gain is not None, view.bias is not None) == (gain, bias)
    view.set_affine(None)
    verify(found)
    inputs = feed(found)
    x = next(iter(inputs.values()))
    plain = nn.functional.layer_norm if kind == "layer" else nn.functional.rms_norm
    expected = plain(x, [4], eps=eps) if eps is not None else plain(x, [4])
    assert torch.equal(found.run(inputs)["output"], expected)


class Attends(nn.Module):
    """Attention with everything that can be said about it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        attend = nn.functional.scaled_dot_product_attention
        grouped = attend(q, k, v, attn_mask=mask, scale=0.5, enable_gqa=True)
        return grouped, attend(q, q, q, is_causal=True)


def test_attention() -> None:
    q, k = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8)
    found = capture(Attends().eval(), (q, k, k, torch.ones(3, 3, dtype=torch.bool)))
    first, second = (view for node in found.graph.nodes if (view := Attention.match(node)))
    names = [
        part.name for part in (first.query, first.key, first.value) if isinstance(part, fx.Node)
    ]
    assert names == ["q", "k", "v"]
    assert first.mask is not None
    assert (first.causal, first.scale, first.grouped) == (False, 0.5, True)
    assert (second.mask, second.causal, second.scale, second.grouped) == (None, True, None, False)


def test_quantised_calls_say_their_type() -> None:
    pass_ = QuantizeWeights(bits=3, group_size=4, symmetric=True)
    found = pass_(program("tied-head")).program
    linear = next(view for node in found.graph.nodes if (view := QuantizedLinear.match(node)))
    table = next(view for node in found.graph.nodes if (view := QuantizedEmbedding.match(node)))
    for view in (linear, table):
        assert (view.bits, view.group_size, view.in_features, view.zeros) == (3, 4, 8, None)
    assert linear.codes.target == table.codes.target
    assert linear.bias is None
    assert table.ids.op == "placeholder"


def test_a_batch_norm_by_fixed_statistics() -> None:
    copy = program("conv-norms").editable()
    view = next(view for node in copy.graph.nodes if (view := BatchNorm.match(node)))
    (output,) = view.outputs
    assert output.args == (view.node, 0)
    assert (view.mean.target, view.variance.target) == (
        "stem_norm.running_mean",
        "stem_norm.running_var",
    )
    assert view.gain is not None
    assert view.gain.target == "stem_norm.weight"
    assert view.eps == 1e-5
    parts = (view.input, view.gain, view.bias, view.mean, view.variance)
    for training in (False, True):
        with copy.graph.inserting_after(view.variance):
            node = copy.graph.call_function(
                aten.batch_norm.default, (*parts, training, 0.1, 2e-5, False)
            )
        plain = BatchNorm.match(node)
        assert (plain is None) == training
        if plain is not None:
            assert (plain.outputs, plain.gain, plain.eps) == ((node,), view.gain, 2e-5)


@pytest.mark.parametrize(
    ("module", "dims", "groups", "transposed", "pads"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), 1, 2, False, False),
        (nn.Conv2d(4, 6, 3, padding=(0, 1)), 2, 1, False, True),
        (nn.Conv2d(4, 6, 3, padding="same"), 2, 1, False, True),
        (nn.Conv3d(4, 6, 1, padding="same"), 3, 1, False, False),
        (nn.Conv2d(4, 6, 3, padding="valid"), 2, 1, False, False),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), 2, 2, True, False),
    ],
)
def test_a_convolution(
    module: nn.Module, dims: int, groups: int, transposed: bool, pads: bool
) -> None:
    x = torch.randn(2, 4, *[7] * dims)
    copy = capture(module.eval(), (x,)).editable()
    view = next(view for node in copy.graph.nodes if (view := Convolution.match(node)))
    assert (view.groups, view.transposed, view.pads) == (groups, transposed, pads)
    assert view.bias is not None
    before = copy.run({"input": x})["output"]
    view.set_weights(view.weight, None)
    verify(copy)
    after = copy.run({"input": x})["output"]
    bias = copy.weight(view.bias).load().reshape(-1, *[1] * dims)
    torch.testing.assert_close(after + bias, before)


def test_the_general_convolution() -> None:
    copy = program("conv-norms").editable()
    view = next(view for node in copy.graph.nodes if (view := Convolution.match(node)))
    for transposed in (False, True):
        settings = ([1, 1], [0, 0], [1, 1], transposed, [0, 0], 3)
        args = (view.input, view.weight, view.bias, *settings)
        with copy.graph.inserting_after(view.node):
            node = copy.graph.call_function(aten.convolution.default, args)
        found = Convolution.match(node)
        assert found is not None
        assert (found.transposed, found.groups, found.pads) == (transposed, 3, False)
