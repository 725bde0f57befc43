"""Wrong passes are caught by the checks that every pipeline makes, without any budget.

Each error names the pass, in its message or its note, and the call or weight that is wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from modelathe.ir import FidelityError, ModelatheError, PassError, Program, VerifyError
from modelathe.passes import Fidelity, Pass, PassContext, PassResult, Pipeline, Remark
from support.edits import EDITS
from support.models import context, program


@dataclass(frozen=True, kw_only=True)
class Broken(Pass):
    """Makes one wrong edit and says that it is equal in exact arithmetic."""

    name: ClassVar[str] = "broken"
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    edit: str

    def run(self, program: Program, context: PassContext) -> PassResult:
        EDITS[self.edit](program, program.graph)
        return PassResult(program, (Remark("applied", "main", self.edit),))


@dataclass(frozen=True, kw_only=True)
class BrokenBitwise(Broken):
    """Says that the same edits change no bit."""

    name: ClassVar[str] = "broken-bitwise"
    fidelity: ClassVar[Fidelity] = Fidelity.BITWISE


@dataclass(frozen=True, kw_only=True)
class BrokenLossy(Broken):
    """Makes the same edits and promises nothing about outputs."""

    name: ClassVar[str] = "broken-lossy"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY


def message_of(caught: pytest.ExceptionInfo[Any]) -> str:
    """Return what a user reads: the message and its notes."""
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])


# edit, model, what the message says besides the pass
EXACT = [
    ("drop_bias", "gpt2", r"first wrong at %linear\w* \(aten.linear of transformer.h.1.mlp.c_fc\)"),
    ("transpose_wrongly", "gpt2", r"\(aten.linear of transformer.h.0.attn.c_proj\)"),
    ("swap_heads", "llama", r"\(aten.linear of model.layers.1.self_attn.q_proj\)"),
    ("move_epsilon", "llama", r"\(aten.rms_norm of model.norm\)"),
    ("move_epsilon", "gpt2", r"\(aten.layer_norm of transformer.ln_f\)"),
    ("swap_cache_outputs", "llama", r"output present.0.key is .* outputs are mixed up"),
    ("read_the_next_cache_entry", "llama", r"first wrong at %cat_\d+ \(aten.cat"),
    ("grow_the_cache_in_front", "llama", r"first wrong at %cat_\d+ \(aten.cat"),
    ("ignore_the_mask", "bert", r"\(aten.scaled_dot_product_attention of encoder.layer.0"),
    ("ignore_the_mask", "gpt2", r"\(aten.scaled_dot_product_attention of transformer.h.0"),
    ("let_padding_in", "llama", r"first wrong at %\w+ \(aten"),
    ("move_positions", "gpt2", r"first wrong at %add\w* \(aten.add.Tensor"),
    ("move_positions", "llama", r"first wrong at %add\w* \(aten.add.Tensor"),
    ("turn_queries_one_position_further", "llama", r"\(aten.add.Tensor of model.rotary_emb\)"),
    ("another_gelu", "gpt2", r"\(aten.gelu of transformer.h.0.mlp.act\)"),
    ("forget_the_scale", "gemma3", r"\(aten.scaled_dot_product_attention of model.layers.1"),
    ("cut_the_residual", "vit", r"first wrong at %\w+ \(aten"),
    ("cut_the_residual", "tied-blocks", r"first wrong at %\w+ \(aten"),
]


@pytest.mark.parametrize(("name", "model", "message"), EXACT)
def test_a_pass_that_breaks_its_promise_is_caught(name: str, model: str, message: str) -> None:
    with pytest.raises(FidelityError, match=message) as caught:
        Pipeline([Broken(edit=name)], context=context())(program(model))
    assert str(caught.value).startswith("broken: ")
    assert re.search(rf"in pass 1 of 1: .*Broken{{edit={name}}}", message_of(caught))
    assert caught.value.remedy


@pytest.mark.parametrize(("name", "model", "message"), [EXACT[0], EXACT[5], EXACT[16]])
def test_so_is_one_that_promises_the_same_bits(name: str, model: str, message: str) -> None:
    with pytest.raises(FidelityError, match=message) as caught:
        Pipeline([BrokenBitwise(edit=name)], context=context())(program(model))
    assert "not the same bits" in str(caught.value)


# What a pass that promises nothing about outputs must keep: caches, padding, ties, tensors.
KEPT: list[tuple[str, str, type[ModelatheError], str]] = [
    (
        "read_the_next_cache_entry",
        "llama",
        FidelityError,
        r"read after a cache gives other outputs.*first at %cat_\d+ \(aten.cat",
    ),
    (
        "grow_the_cache_in_front",
        "gpt2",
        FidelityError,
        r"read after a cache gives other outputs.*first at %\w+ \(aten",
    ),
    (
        "swap_cache_outputs",
        "gpt2",
        FidelityError,
        r"read after a cache gives other outputs.*first at %cat_\d+ \(aten.cat",
    ),
    (
        "let_padding_in",
        "llama",
        FidelityError,
        r"padding changes the outputs.*first at %\w+ \(aten",
    ),
    (
        "ignore_the_mask",
        "bert",
        FidelityError,
        r"padding changes the outputs.*\(aten.scaled_dot_product_attention of encoder.layer.0",
    ),
    ("write_in_place", "norm-mlp", VerifyError, "@fresh: was written to in place"),
    ("untie", "llama", PassError, "untied model.embed_tokens.weight and did not say so"),
]


@pytest.mark.parametrize(("name", "model", "kind", "message"), KEPT)
def test_a_lossy_pass_keeps_what_every_pass_keeps(
    name: str, model: str, kind: type[ModelatheError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        Pipeline([BrokenLossy(edit=name)], context=context())(program(model))
    assert re.search(rf"in pass 1 of 1: .*BrokenLossy{{edit={name}}}", message_of(caught))


@pytest.mark.parametrize("name", ["swap_heads", "move_positions"])
def test_nothing_else_is_asked_of_a_lossy_pass_without_claims(name: str) -> None:
    """Another function on purpose, as far as anybody can tell: measured, and not stopped."""
    result = Pipeline([BrokenLossy(edit=name)], context=context())(
        program("gpt2" if name == "move_positions" else "llama")
    )
    assert result.steps[-1].measured.kl


@dataclass(frozen=True, kw_only=True)
class Silent(Broken):
    """Changes the program and makes no remark."""

    name: ClassVar[str] = "silent"

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(super().run(program, context).program)


def test_a_silent_change_is_an_error() -> None:
    with pytest.raises(PassError, match="silent: changed the program and made no 'applied' remark"):
        Silent(edit="swap_heads")(program("llama"))
