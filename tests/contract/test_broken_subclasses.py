"""Our own passes, spoiled: what they claim about their results is checked in every pipeline."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from modelathe.ir import FidelityError, PassError, Program, find_blocks
from modelathe.passes import (
    ConvertDtype,
    FoldNorms,
    Pass,
    PassContext,
    PassResult,
    Pipeline,
    PruneBlocks,
    QuantizeWeights,
    TieBlocks,
)
from modelathe.passes.canonical import formulas
from modelathe.passes.norms import gains
from modelathe.passes.tying import tie_blocks
from support.edits import EDITS
from support.models import context, program


class Spoiled(Pass):
    """Does what its pass does, and then makes a wrong edit."""

    spoil: str

    def run(self, program: Program, context: PassContext) -> PassResult:
        result = super().run(program, context)  # type: ignore[safe-super]
        EDITS[self.spoil](result.program, next(iter(result.program.graphs.values())))
        return result


@dataclass(frozen=True, kw_only=True)
class SpoiledQuantize(Spoiled, QuantizeWeights):
    """Rounds, and spoils."""

    name: ClassVar[str] = "spoiled-quantize"
    spoil: str


@dataclass(frozen=True, kw_only=True)
class SpoiledPrune(Spoiled, PruneBlocks):
    """Removes blocks, and spoils."""

    name: ClassVar[str] = "spoiled-prune"
    spoil: str


@dataclass(frozen=True, kw_only=True)
class SpoiledTie(Spoiled, TieBlocks):
    """Ties blocks, and spoils."""

    name: ClassVar[str] = "spoiled-tie"
    spoil: str


@dataclass(frozen=True, kw_only=True)
class SpoiledConvert(Spoiled, ConvertDtype):
    """Converts, and spoils."""

    name: ClassVar[str] = "spoiled-convert"
    spoil: str


def quantize(spoil: str) -> Pass:
    return SpoiledQuantize(spoil=spoil, group_size=4, method="rtn")


def prune(spoil: str) -> Pass:
    return SpoiledPrune(spoil=spoil, blocks=(1,))


def tie(spoil: str) -> Pass:
    return SpoiledTie(spoil=spoil, unique=1)


def convert(spoil: str) -> Pass:
    return SpoiledConvert(spoil=spoil, to="bfloat16")


UP = r"@layers\.1\.up\.weight"
CASES: list[tuple[Callable[[str], Pass], str, str, str]] = [
    (
        quantize,
        "scales_off_by_one_group",
        "tied-blocks",
        f"{UP}: the stored codes do not stand for",
    ),
    (quantize, "one_code_off_by_one", "tied-blocks", rf"{UP}: the stored codes do not stand for"),
    (quantize, "nibbles_swapped", "tied-blocks", f"{UP}: the stored codes do not stand for"),
    (quantize, "zeros_forgotten", "tied-blocks", f"{UP}: "),
    (
        quantize,
        "bias_forgotten",
        "tied-blocks",
        r"%quantized_linear\w+: does not do what %linear_2",
    ),
    (quantize, "codes_of_a_neighbour", "tied-blocks", r"%quantized_linear\w+: does not do what"),
    (quantize, "input_of_a_neighbour", "tied-blocks", r"%quantized_linear\w+: does not do what"),
    (quantize, "move_epsilon", "tied-blocks", "%layer_norm_2: does not do what %layer_norm_2 did"),
    (quantize, "cut_the_residual", "tied-blocks", r"%\w+: does not do what"),
    (quantize, "ignore_the_mask", "llama", "%scaled_dot_product_attention: does not do what"),
    (quantize, "move_positions", "gpt2", r"%\w+: does not do what"),
    (prune, "move_epsilon", "gpt2", r"output logits .*\(aten.layer_norm of transformer.ln_f\)"),
    (prune, "move_positions", "llama", r"output \S+ is not that of .*\(aten"),
    (prune, "another_gelu", "gemma3", r"\(aten.gelu of model.layers.0.mlp.act_fn\)"),
    (prune, "ignore_the_mask", "gemma3", r"\(aten.scaled_dot_product_attention of model.layers.0"),
    (tie, "norms_of_a_neighbour", "tied-blocks", "%layer_norm: does not do what %layer_norm did"),
    (tie, "move_epsilon", "tied-blocks", "%layer_norm_2: does not do what"),
    (tie, "ignore_the_mask", "llama", "%scaled_dot_product_attention: does not do what"),
    (convert, "move_epsilon", "llama", r"first wrong at %\w+ \(aten.rms_norm of model.norm\)"),
    (convert, "drop_bias", "gpt2", r"\(aten.linear of transformer.h.1.mlp.c_fc\)"),
]


@pytest.mark.parametrize(("make", "spoil", "model", "message"), CASES)
def test_a_spoiled_pass_of_ours_is_caught(
    make: Callable[[str], Pass], spoil: str, model: str, message: str
) -> None:
    with pytest.raises((PassError, FidelityError), match=message) as caught:
        Pipeline([make(spoil)], context=context())(program(model))
    (note,) = caught.value.__notes__
    assert re.search(rf"in pass 1 of 1: .*{make(spoil).__class__.__name__}", note)


@dataclass(frozen=True, kw_only=True)
class AnotherBlock(PruneBlocks):
    """Removes another block than the one that was asked for."""

    name: ClassVar[str] = "another-block"

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PruneBlocks(blocks=(self.blocks[0] + 1,)).run(program, context)


@dataclass(frozen=True, kw_only=True)
class WrongResidual(PruneBlocks):
    """Joins the residual stream to the input of the block before."""

    name: ClassVar[str] = "wrong-residual"

    def run(self, program: Program, context: PassContext) -> PassResult:
        before, gone = find_blocks(program.graph)[:2]
        assert before.input is not None
        assert gone.input is not None
        for user in [node for node in gone.input.users if node in gone.nodes]:
            user.replace_input_with(gone.input, before.input)
        result = super().run(program, context)
        after = find_blocks(result.program.graph)[1]
        assert after.input is not None
        stale = next(n for n in result.program.graph.nodes if n.name == before.input.name)
        for user in [node for node in after.input.users if node in after.nodes]:
            user.replace_input_with(after.input, stale)
        return result


@pytest.mark.parametrize(
    ("pass_", "message"),
    [
        (AnotherBlock(blocks=(0,)), "the blocks model.layers.1 are gone"),
        (WrongResidual(blocks=(1,)), r"output logits .* first wrong at %\w+ \(aten.*layers.2"),
    ],
)
def test_a_block_that_is_taken_out_wrongly_is_caught(pass_: Pass, message: str) -> None:
    with pytest.raises(PassError, match=message) as caught:
        Pipeline([pass_], context=context())(program("gemma3"))
    assert type(pass_).__name__ in caught.value.__notes__[0]


def square(weight: Tensor, gain: Tensor) -> Tensor:
    return weight.double() * gain.double() ** 2


def transposed(weight: Tensor, gain: Tensor) -> Tensor:
    return weight.double() * gain.double()[: len(weight)].unsqueeze(1)


def without_old_bias(weight: Tensor, shift: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.mv(weight.double(), shift.double())


@pytest.mark.parametrize(
    ("attribute", "function"),
    [("_scale_columns", square), ("_scale_columns", transposed), ("_shift", without_old_bias)],
)
def test_a_wrong_fold_is_caught(
    monkeypatch: pytest.MonkeyPatch, attribute: str, function: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(gains, attribute, function)
    with pytest.raises(
        FidelityError, match=r"fold-norms: .*\(aten.linear of layers.0.up\)"
    ) as caught:
        Pipeline([FoldNorms()], context=context())(program("tied-blocks"))
    assert "in pass 1 of 1: fold-norms" in caught.value.__notes__


def test_a_wrong_epsilon_of_a_raised_norm_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = formulas._normalized

    def wrong(node: Any) -> Any:
        found = real(node)
        return found if found is None else (found[0], 1e-3, found[2])

    monkeypatch.setattr(formulas, "_normalized", wrong)
    message = r"canonicalize: .*\(aten.rms_norm of model.layers.0.input_layernorm\)"
    with pytest.raises(FidelityError, match=message) as caught:
        Pipeline([], context=context())(program("llama"))
    assert caught.value.__notes__ == ["in pass 0 of 0: canonicalize"]


def test_a_sum_in_place_of_a_mean_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tie_blocks, "_mean", lambda *tensors: sum(t.double() for t in tensors))
    message = r"@layers.0.\S+: is not the mean of @layers.0"
    with pytest.raises(PassError, match=message):
        Pipeline([TieBlocks(unique=1, init="average")], context=context())(program("tied-blocks"))


@dataclass(frozen=True, kw_only=True)
class LastBlock(TieBlocks):
    """Takes the weights of the last block for every one."""

    name: ClassVar[str] = "last-block"

    def _source(self, k: int, count: int) -> int:
        return count - 1 if self.unique == 1 else super()._source(k, count)


def test_weights_of_the_wrong_block_are_caught() -> None:
    result = LastBlock(unique=1)(program("tied-blocks"))
    with pytest.raises(PassError, match=r"layers.0: reads the weights of the wrong block"):
        TieBlocks(unique=1).ensures(program("tied-blocks"), result.program)
