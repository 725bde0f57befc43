"""Which hand-written formulas become one call, and which look alike and do not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import call_name, capture
from modelathe.passes import Canonicalize, PassContext
from support.formulas import Formula, cohere, made, rms
from support.views import calls

F = nn.functional


def layer(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)


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
