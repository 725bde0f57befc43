"""Blocks are labelled by where their norms stand, whatever the architecture is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelathe.ir import Norm, Program, capture
from modelathe.passes import Canonicalize, FoldNorms
from modelathe.passes.analysis.norm_placement import is_query_key_norm, norm_placement
from support.models import Transformer, canonical

F = nn.functional

_COMMON = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_GPT2 = {**_COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
OTHERS: dict[str, dict[str, Any]] = {
    "gptj": {**_GPT2, "rotary_dim": 4},
    "falcon": {**_SIZES, "new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma2": {**_GROUPED, "query_pre_attn_scalar": 8},
    "olmo2": _GROUPED,
    "qwen3": _GROUPED,
}


def labels(found: Program, graph: str | None = None) -> list[str]:
    return [block.placement for block in norm_placement(found, graph).blocks]


def captured(kind: str) -> Program:
    torch.manual_seed(0)
    model = Transformer("AutoModelForCausalLM", kind, OTHERS[kind])().eval()
    return Canonicalize()(capture(model)).program


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("llama", "pre"),
        ("gpt2", "pre"),
        ("vit", "pre"),
        ("bert", "post"),
        ("albert", "post"),
        ("gemma3", "sandwich"),
    ],
)
def test_blocks_of_transformers_models_are_labelled(name: str, label: str) -> None:
    assert set(labels(canonical(name))) == {label}


@pytest.mark.parametrize(
    ("kind", "label", "norms", "special"),
    [
        ("gptj", "parallel", 1, 0),
        ("falcon", "parallel", 2, 0),
        ("gemma2", "sandwich", 4, 0),
        ("olmo2", "peri", 2, 2),
        ("qwen3", "pre", 2, 2),
    ],
)
def test_more_blocks_are_labelled(kind: str, label: str, norms: int, special: int) -> None:
    found = norm_placement(captured(kind))
    counts = [(b.placement, len(b.norms), len(b.query_key)) for b in found.blocks]
    assert counts == [(label, norms, special)] * 2
    assert len(found.outside) == 1


def test_each_graph_is_labelled() -> None:
    for graph in ("encoder", "decoder"):
        assert labels(canonical("t5"), graph) == ["pre", "pre"]


def test_norms_outside_of_blocks_are_listed() -> None:
    found = norm_placement(canonical("bert"))
    assert found.outside == ("layer_norm",)
    assert {block.kinds for block in found.blocks} == {("layer", "layer")}


def test_folding_changes_no_label() -> None:
    assert labels(FoldNorms()(canonical("llama")).program) == ["pre", "pre"]


class Layer(nn.Module):
    """Two sublayers, with a norm wherever the letters say so."""

    def __init__(self, form: Callable[[Layer, Tensor], Tensor]) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(4)])
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


class Layers(nn.Module):
    """Two layers of one form."""

    def __init__(self, form: Callable[[Layer, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(form), Layer(form)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def pre(m: Layer, x: Tensor) -> Tensor:
    x = x + m.first(m.norms[0](x)).relu()
    return x + 0.5 * m.second(m.norms[1](x)).relu()


def post(m: Layer, x: Tensor) -> Tensor:
    x = m.norms[0](x + m.first(x).relu())
    result: Tensor = m.norms[1](m.second(x).relu() + x)
    return result


def peri(m: Layer, x: Tensor) -> Tensor:
    x = x + m.norms[0](m.first(x))
    return x + m.norms[1](m.second(x))


def sandwich(m: Layer, x: Tensor) -> Tensor:
    x = x + m.norms[1](m.first(m.norms[0](x)))
    return m.norms[3](m.second(m.norms[2](x))) + x


def parallel(m: Layer, x: Tensor) -> Tensor:
    y = m.norms[0](x)
    return x + m.first(y).relu() + m.second(y).relu()


def without(m: Layer, x: Tensor) -> Tensor:
    x = x + m.first(x).relu()
    return x + m.second(x).relu()


def mixed(m: Layer, x: Tensor) -> Tensor:
    x = x + m.first(m.norms[0](x)).relu()
    return x + m.norms[1](m.second(x).relu())


def half_post(m: Layer, x: Tensor) -> Tensor:
    x = m.norms[0](x + m.first(x).relu())
    return x + m.second(x).relu()


def reshaped(m: Layer, x: Tensor) -> Tensor:
    x = x + m.first(m.norms[0](x)).relu()
    flat = x.reshape(-1, 8)
    return (flat + m.second(m.norms[1](flat)).relu()).reshape(x.shape)


def experts(m: Layer, x: Tensor) -> Tensor:
    """The second sublayer is a sum of two."""
    x = x + m.first(m.norms[0](x)).relu()
    y = m.norms[1](x)
    return x + (m.second(y).relu() + m.first(y).tanh())


@pytest.mark.parametrize(
    ("form", "label"),
    [
        (pre, "pre"),
        (post, "post"),
        (peri, "peri"),
        (sandwich, "sandwich"),
        (parallel, "parallel"),
        (without, "none"),
        (mixed, "none"),
        (half_post, "none"),
        (reshaped, "pre"),
        (experts, "pre"),
    ],
)
def test_every_form_has_its_label(form: Callable[[Layer, Tensor], Tensor], label: str) -> None:
    found = Canonicalize()(capture(Layers(form).eval(), (torch.ones(2, 3, 8),))).program
    assert labels(found) == [label, label]


class Attention(nn.Module):
    """Attention of one head with a norm on queries, and another norm where ``where`` says."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.norm = where, nn.RMSNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.where == "query":
            q = self.norm(q) * 2
        elif self.where == "key":
            k = torch.cat([self.norm(k), k], 1)[:, :3]
        elif self.where == "value":
            v = self.norm(v)
        elif self.where == "both":
            q = self.norm(q)
            v = v + q
        elif self.where == "product":
            return (self.norm(q) @ k.transpose(1, 2)).softmax(-1) @ v
        elif self.where == "weight":
            return self.norm(q) @ self.q.weight.t() + v
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("query", True),
        ("key", True),
        ("product", True),
        ("value", False),
        ("both", False),
        ("weight", False),
    ],
)
def test_norms_of_queries_and_keys_are_told_apart(where: str, expected: bool) -> None:
    found = Canonicalize()(capture(Attention(where).eval(), (torch.ones(2, 3, 8),))).program
    (node,) = (node for node in found.graph.nodes if Norm.match(node))
    assert is_query_key_norm(node) is expected
