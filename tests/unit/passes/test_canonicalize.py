"""Which hand-written formulas become one call, and which look alike and do not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import Attention, ComputedWeight, Program, call_name, capture
from modelathe.passes import Canonicalize, PassContext
from support.feeds import feed
from support.models import MODELS, canonical, perturb, program
from support.numeric import EXACT, rounding, worst_error

F = nn.functional


class Formula(nn.Module):
    """A function of an input ``[2, 3, 8]`` and a few weights."""

    def __init__(self, function: Callable[[Formula, Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.function = function
        self.gain, self.shift = (nn.Parameter(torch.ones(8)) for _ in range(2))
        self.matrix, self.scalar = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(1))
        perturb(self, seed=2)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def made(
    function: Callable[[Formula, Tensor], Tensor], dtype: torch.dtype = torch.float32
) -> tuple[Program, Program]:
    """Return a formula as it is captured, and as it is after the pass; checked to be equal."""
    model = Formula(function, dtype).eval()
    before = capture(model, (torch.ones(2, 3, 8, dtype=dtype),))
    after = Canonicalize()(before).program
    inputs = feed(before)
    wide = [each.run(inputs, dtype=torch.float64) for each in (after, before)]
    assert worst_error(*wide) <= EXACT
    assert worst_error(after.run(inputs), before.run(inputs)) <= rounding(dtype)
    return before, after


def calls(found: Program) -> list[str]:
    return [call_name(node) for node in found.graph.nodes if node.op == "call_function"]


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def layer(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)


def cohere(x: Tensor) -> Tensor:
    """Centre twice, as Cohere does."""
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5)


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


RAISED: dict[str, tuple[Callable[[Formula, Tensor], Tensor], list[str]]] = {
    "rms norm": (lambda m, x: m.gain * rms(x), ["aten.rms_norm"]),
    "rms norm, x * x": (
        lambda m, x: x * (x * x).mean(-1, keepdim=True).add(1e-6).rsqrt() * m.gain,
        ["aten.rms_norm"],
    ),
    "rms norm, power": (
        lambda m, x: x * (x.pow(2).mean(2, keepdim=True) + 1e-6).pow(-0.5),
        ["aten.rms_norm"],
    ),
    "rms norm, 1 + gain": (lambda m, x: rms(x) * (1 + m.gain), ["aten.rms_norm"]),
    "layer norm": (lambda m, x: layer(x) * m.gain + m.shift, ["aten.layer_norm"]),
    "layer norm without gain": (lambda m, x: layer(x), ["aten.layer_norm"]),
    "layer norm, centred twice": (lambda m, x: m.gain * cohere(x), ["aten.layer_norm"]),
    "layer norm, its mean taken twice": (
        lambda m, x: (
            (x - x.mean(-1, keepdim=True))
            * torch.rsqrt((x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + 1e-5)
        ),
        ["aten.layer_norm"],
    ),
    "gelu, tanh": (lambda m, x: tanh_gelu(x), ["aten.gelu"]),
    "gelu, tanh in another order": (
        lambda m, x: x * 0.5 * (torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)) + 1),
        ["aten.gelu"],
    ),
    "gelu, erf": (lambda m, x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), ["aten.gelu"]),
    "gelu, erf times a constant": (
        lambda m, x: 0.5 * x * (1 + torch.erf(x * 0.7071067811865476)),
        ["aten.gelu"],
    ),
    "product": (lambda m, x: x.view(-1, 8) @ m.matrix, ["aten.reshape", "aten.linear"]),
    "product between views": (
        lambda m, x: torch.addmm(m.shift, x.view(-1, 8), m.matrix).view(2, 3, 8),
        ["aten.linear"],
    ),
    "transposed product": (
        lambda m, x: torch.mm(x.view(-1, 8), m.matrix.t()),
        ["aten.reshape", "aten.linear"],
    ),
    "product, then a bias": (lambda m, x: x @ m.matrix.t() + m.shift, ["aten.linear"]),
    "a bias, then a flat product": (
        lambda m, x: m.shift + (x.view(-1, 8) @ m.matrix).view(2, 3, 8),
        ["aten.linear"],
    ),
    "linear, then a bias": (lambda m, x: F.linear(x, m.matrix) + m.shift, ["aten.linear"]),
    "copies": (lambda m, x: x.clone().contiguous().relu().float().detach(), ["aten.relu"]),
    "neutral numbers": (lambda m, x: ((x * 1 + 0) / 1).relu(), ["aten.relu"]),
    "views of the same shape": (lambda m, x: x.view(2, 3, 8)[:, 0:, :99].relu(), ["aten.relu"]),
    "dropout that is off": (lambda m, x: F.dropout(x, 0.5, False).relu(), ["aten.relu"]),
}


@pytest.mark.parametrize("case", RAISED)
def test_a_formula_becomes_one_call(case: str) -> None:
    function, expected = RAISED[case]
    _, after = made(function)
    assert calls(after) == expected


KEPT: dict[str, tuple[Callable[[Formula, Tensor], Tensor], str]] = {
    "mean over another axis": (
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
        "aten.rsqrt",
    ),
    "mean of another value": (
        lambda m, x: x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6),
        "aten.rsqrt",
    ),
    "cube": (lambda m, x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6), "aten.rsqrt"),
    "gain of one number": (lambda m, x: rms(x) * m.scalar, "aten.mul.Tensor"),
    "another constant in gelu": (
        lambda m, x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x.pow(3)))),
        "aten.tanh",
    ),
    "another half in gelu": (
        lambda m, x: 0.4 * x * (1 + torch.erf(x / math.sqrt(2.0))),
        "aten.erf",
    ),
    "gelu of two values": (
        lambda m, x: 0.5 * x * (1 + torch.erf((x + 1) / math.sqrt(2.0))),
        "aten.erf",
    ),
    "scaled sum": (
        lambda m, x: torch.addmm(m.shift, x.view(-1, 8), m.matrix, alpha=2.0),
        "aten.addmm",
    ),
    "product of activations": (lambda m, x: torch.mm(x.view(6, 8), x.view(8, 6)), "aten.mm"),
    "centred by two means": (
        lambda m, x: (
            (x - x.mean(-1, keepdim=True))
            * torch.rsqrt((x - x.mean(0, keepdim=True)).pow(2).mean(-1, keepdim=True) + 1e-5)
        ),
        "aten.rsqrt",
    ),
    "linear with a bias, then another": (
        lambda m, x: F.linear(x, m.matrix, m.gain) + m.shift,
        "aten.add.Tensor",
    ),
    "linear plus half a bias": (
        lambda m, x: torch.add(F.linear(x, m.matrix), m.shift, alpha=0.5),
        "aten.add.Tensor",
    ),
    "linear plus one number": (lambda m, x: F.linear(x, m.matrix) + m.scalar, "aten.add.Tensor"),
    "linear plus a value": (lambda m, x: F.linear(x, m.matrix) + x, "aten.add.Tensor"),
    "linear plus a matrix": (
        lambda m, x: F.linear(x[:, :1], m.matrix) + m.matrix[:1],
        "aten.add.Tensor",
    ),
    "every second column": (lambda m, x: x[..., ::2], "aten.slice.Tensor"),
    "twice": (lambda m, x: x * 2, "aten.mul.Tensor"),
    "plus one": (lambda m, x: x + 1, "aten.add.Tensor"),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_looks_alike_is_left_alone(case: str) -> None:
    function, kept = KEPT[case]
    _, after = made(function)
    assert kept in calls(after)


def test_dropout_that_is_on_is_no_copy() -> None:
    model = Formula(lambda m, x: F.dropout(x, 0.5, training=True), torch.float32).eval()
    after = Canonicalize()(capture(model, (torch.ones(2, 3, 8),))).program
    assert calls(after) != []


def test_a_value_in_the_middle_that_others_read_stays_right() -> None:
    def function(m: Formula, x: Tensor) -> Tensor:
        normal = rms(x)
        return normal * m.gain + normal

    _, after = made(function)
    assert calls(after) == ["aten.rms_norm", "aten.mul.Tensor", "aten.add.Tensor"]


def test_a_bias_of_a_product_that_others_read_stays_a_sum() -> None:
    def function(m: Formula, x: Tensor) -> Tensor:
        product = F.linear(x, m.matrix)
        return (product + m.shift) * product

    _, after = made(function)
    assert calls(after) == ["aten.linear", "aten.add.Tensor", "aten.mul.Tensor"]


def test_two_draws_of_a_random_value_are_not_one() -> None:
    def function(m: Formula, x: Tensor) -> Tensor:
        one, other = (F.dropout(x, 0.5, training=True) for _ in range(2))
        return one * torch.rsqrt(other.pow(2).mean(-1, keepdim=True) + 1e-6)

    model = Formula(function, torch.float32).eval()
    after = Canonicalize().run(capture(model, (torch.ones(2, 3, 8),)), PassContext()).program
    assert "aten.rsqrt" in calls(after)


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_the_epsilon_is_kept(eps: float) -> None:
    _, after = made(lambda m, x: rms(x, eps))
    (node,) = (node for node in after.graph.nodes if call_name(node) == "aten.rms_norm")
    assert node.args[3] == eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_around_a_norm_go(dtype: torch.dtype) -> None:
    _, after = made(lambda m, x: m.gain * rms(x.float()).to(x.dtype), dtype)
    assert calls(after) == ["aten.rms_norm"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_so_they_do_where_the_gain_is_converted_too(dtype: torch.dtype) -> None:
    _, after = made(lambda m, x: (m.gain.float() * cohere(x.float())).to(x.dtype), dtype)
    assert calls(after) == ["aten.layer_norm"]


def test_a_bias_of_another_dtype_stays_a_sum() -> None:
    _, after = made(lambda m, x: F.linear(x, m.matrix).float() + m.shift.float(), torch.bfloat16)
    assert "aten.add.Tensor" in calls(after)


def test_a_gain_that_is_computed_in_float32_is_rounded_once() -> None:
    """Gemma writes ``norm(x.float()) * (1 + w.float())``: in a wide run, nothing is rounded."""
    before, after = made(
        lambda m, x: (rms(x.float()) * (1 + m.gain.float())).to(x.dtype), torch.bfloat16
    )
    inputs = feed(before)
    assert worst_error(after.run(inputs), before.run(inputs)) <= rounding(torch.bfloat16, 2)


def test_a_narrow_weight_in_the_middle_of_a_rule_does_not_narrow() -> None:
    """``(1 + w).half()`` is asked for in float64 and comes in float64."""
    before, after = made(lambda m, x: x * (1 + m.gain).half())
    (name,) = (name for name in after.weights if name.startswith("gain"))
    weight = after.weights[name]
    assert isinstance(weight, ComputedWeight)
    assert weight.dtype == torch.float16
    assert torch.equal(weight.load(torch.float64), 1 + before.weight("gain").load().double())
    assert torch.equal(weight.load(), (1 + before.weight("gain").load()).half())


def test_weights_computed_from_weights_are_computed_when_they_are_read() -> None:
    _, after = made(lambda m, x: x * (1 + m.gain).exp())
    (name,) = after.weights
    assert isinstance(after.weights[name], ComputedWeight)


def test_a_transposed_weight_is_one_weight_for_all_its_readers() -> None:
    _, after = made(lambda m, x: (x.view(-1, 8) @ m.matrix) + (x.view(-1, 8).relu() @ m.matrix))
    assert list(after.weights) == ["matrix.transposed"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "llama-bf16", "t5"])
def test_nothing_is_left_of_norms_gelus_and_flat_products(name: str) -> None:
    for graph in canonical(name).graphs.values():
        found = {call_name(node) for node in graph.nodes}
        assert not found & {"aten.rsqrt", "aten.tanh", "aten.addmm", "aten.mm", "aten.clone"}


@pytest.mark.parametrize("name", ["llama", "gemma3", "llama-bf16"])
def test_repeated_heads_become_grouped_attention(name: str) -> None:
    found = [view for node in canonical(name).graph.nodes if (view := Attention.match(node))]
    assert found
    for view in found:
        assert view.grouped
        parts = (view.query, view.key, view.value)
        assert [part.meta["val"].shape[1] for part in parts] == [4, 2, 2]


def test_heads_repeated_in_another_order_are_left_alone() -> None:
    def function(m: Formula, x: Tensor) -> Tensor:
        query = x.view(2, 3, 4, 2).transpose(1, 2)
        key = query[:, :2].repeat(1, 2, 1, 1)  # heads 0 1 0 1, and not 0 0 1 1
        return F.scaled_dot_product_attention(query, key, key)

    _, after = made(function)
    (view,) = (view for node in after.graph.nodes if (view := Attention.match(node)))
    assert not view.grouped


def test_each_size_is_asked_once() -> None:
    for name in ("llama", "t5"):
        for graph in canonical(name).graphs.values():
            sizes = [
                str(node.meta["val"])
                for node in graph.nodes
                if isinstance(node.meta.get("val"), torch.SymInt)
            ]
            assert len(sizes) == len(set(sizes))


@pytest.mark.parametrize("name", MODELS)
def test_remarks_say_what_was_done(name: str) -> None:
    result = Canonicalize()(program(name))
    changed = {graph for graph in result.program.graphs if result.modified}
    assert {remark.where for remark in result.remarks} <= changed
    assert all(remark.message[0].isdigit() for remark in result.remarks)
